"""Load on the experts against counts made one use at a time."""

from collections import Counter

import numpy as np
import pytest

from trainer.expert_tally import ExpertTally

TASKS, EXPERTS = 3, 5


def test_counts_every_use() -> None:
    rng = np.random.default_rng(0)
    tally, uses, active = ExpertTally(), Counter[int](), []
    for _ in range(7):
        chosen = [[set(rng.choice(EXPERTS, 2, replace=False).tolist()) for _ in range(TASKS)] for _ in range(11)]
        load = np.zeros((TASKS, EXPERTS), np.int64)
        for tasks in chosen:
            active.append(len(set().union(*tasks)))
            for t, experts in enumerate(tasks):
                uses.update(experts)
                load[t, list(experts)] += 1
        tally.add(np.array(active[-11:]), load)
    total = sum(uses.values())
    assert tally.instances == 77
    assert tally.mean == pytest.approx(np.mean(active))
    assert tally.max == max(active)
    assert tally.load_share == pytest.approx([uses[e] / total for e in range(EXPERTS)])
    assert tally.load_skew == pytest.approx(max(uses.values()) / (total / EXPERTS))
    again = ExpertTally()
    again.load_state(tally.state())
    assert again.summary() == tally.summary()


def test_a_ranker_without_experts_has_none() -> None:
    assert ExpertTally().summary() == {"active_mean": None, "active_max": None, "load_skew": None, "load_share": []}
