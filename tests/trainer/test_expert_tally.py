"""Load on the experts against counts made one use at a time."""

from collections import Counter

import numpy as np
import pytest

from smes.events import ExampleBlock
from smes.rankers.ranker import ExpertLimits
from tests.trainer.small_world import SCHEMA
from trainer.routing_figures import ExpertTally

TASKS, EXPERTS = 3, 5
LIMITS = ExpertLimits(bound=4, num_experts=EXPERTS)


def test_counts_every_use() -> None:
    rng = np.random.default_rng(0)
    tally, uses, active = ExpertTally(LIMITS), Counter[int](), []
    for _ in range(7):
        chosen = [[set(rng.choice(EXPERTS, 2, replace=False).tolist()) for _ in range(TASKS)] for _ in range(11)]
        load = np.zeros((TASKS, EXPERTS), np.int64)
        for tasks in chosen:
            active.append(len(set().union(*tasks)))
            for t, experts in enumerate(tasks):
                uses.update(experts)
                load[t, list(experts)] += 1
        tally.add(ExampleBlock.empty(SCHEMA, 11), np.array(active[-11:]), load)
    total = sum(uses.values())
    assert tally.instances == 77
    assert tally.mean == pytest.approx(np.mean(active))
    assert tally.max == max(active)
    assert tally.load_share == pytest.approx([uses[e] / total for e in range(EXPERTS)])
    assert tally.load_skew == pytest.approx(max(uses.values()) / (total / EXPERTS))
    again = ExpertTally(LIMITS)
    again.load_state(tally.state())
    assert again.summary() == tally.summary()


def test_experts_that_always_run_do_not_count_as_skew() -> None:
    tally = ExpertTally(ExpertLimits(bound=3, num_experts=4, num_fixed=1))
    tally.add(ExampleBlock.empty(SCHEMA, 6), np.full(6, 2), np.array([[6, 3, 2, 1], [6, 3, 1, 2]]))
    assert tally.load_skew == pytest.approx(6 / 4)
    assert tally.load_share == pytest.approx([0.5, 0.25, 0.125, 0.125])


def test_a_ranker_without_experts_has_none() -> None:
    summary = ExpertTally(None).summary()
    assert set(summary.pop("routing").values()) == {None}
    assert summary == {"active_mean": None, "active_max": None, "load_skew": None, "load_share": []}
