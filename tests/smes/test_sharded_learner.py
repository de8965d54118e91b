"""Learners that share out the rows: their states, what they serve, and what they cannot do."""

import numpy as np
import pytest
import torch
from torch import Tensor

from smes.events import ExampleBlock
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.learner import Learner
from smes.model.request_split import Splits
from smes.model.rows_config import RowsConfig
from smes.model.shards import owner_of
from smes.schema import Schema
from smes.world import ALONE, World
from tests.smes.plain_smes import plain
from tests.smes.streams import RICH_SCHEMA, stream
from tests.smes.test_once_per_request import SCHEMA as REQUESTS
from tests.smes.test_requests_in_training import CASES, blocks
from tests.worlds import on_ranks

_LINEAR = ModelConfig("linear")
_SMALL = ModelConfig(
    embedding_dim=8, smes=plain({"experts.num": 8, "num_shared": 1, "encoder_dims": (16,), "experts.dims": (8,)})
)
_ROWS = RowsConfig(admit_after=2, shared_rows=3, budget=25)


def _learner(world: World, model: ModelConfig, rows: RowsConfig | None = None, schema: Schema = RICH_SCHEMA) -> Learner:
    return Learner(schema, model, OptimizerConfig(), rows, device=torch.device("cpu"), seed=3, world=world)


def _part(world: World, block: ExampleBlock, step: int) -> ExampleBlock:
    """This rank's part of a batch; one rank after the other has none."""
    has = np.arange(len(block)) % world.size
    has[has == step % world.size] = (step + 1) % world.size
    return block.take(has == world.rank)


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_restart_of_all_ranks_changes_no_bit() -> None:
    steps = stream(RICH_SCHEMA, batches=8, size=32, items=60)

    def work(world: World) -> tuple[dict[str, Tensor], int, bool]:
        through, again = (_learner(world, _SMALL, _ROWS) for _ in range(2))
        for step, block in enumerate(steps[:4]):
            through.step(through.prepare(_part(world, block, step)))
        state = through.state()
        again.load_state(state)
        assert again.num_rows == through.num_rows
        for learner in (through, again):
            for step, block in enumerate(steps[4:], 4):
                learner.step(learner.prepare(_part(world, block, step)))
        return state, through.num_rows, _same(through.state(), again.state())

    found = on_ranks(2, work)
    assert all(same for _, _, same in found)
    assert sum(rows for _, rows, _ in found) > 25  # the budget, and the rows that every table has

    def load_that_of_another(world: World) -> str:
        with pytest.raises(ValueError, match="another rank's, expected those of rank") as refused:
            _learner(world, _SMALL, _ROWS).load_state(found[1 - world.rank][0])
        return str(refused.value)

    assert ["rank 0 of 2" in text for text in on_ranks(2, load_that_of_another)] == [True, False]


def test_ranks_go_on_from_what_one_rank_serves_and_serve_it_in_parts() -> None:
    one = _learner(ALONE, _LINEAR)
    for block in stream(RICH_SCHEMA, batches=3, size=32):
        one.step(one.prepare(block))
    serving = one.serving_state()

    def work(world: World) -> dict[str, Tensor]:
        learner = _learner(world, _LINEAR)
        learner.load_serving_state(serving, 3)
        assert learner.step_number == 3
        view = learner.full_view()
        assert view.num_rows == learner.num_rows == sum(len(keys) for keys, _ in view.blocks())
        view.close()
        return learner.serving_state()

    parts = on_ranks(4, work)
    rows = dict(zip(serving["table.keys"].tolist(), serving["table.wide"].tolist(), strict=True))
    for rank, part in enumerate(parts):
        keys = part["table.keys"]
        assert (owner_of(keys.numpy(), 4) == rank).all()
        assert [rows.pop(key) for key in keys.tolist()] == part["table.wide"].tolist()
        assert all(torch.equal(part[name], serving[name]) for name in serving if name.startswith("dense."))
    assert not rows


def test_what_needs_all_rows_is_refused() -> None:
    block = stream(RICH_SCHEMA, batches=1, size=4)[0]

    def work(world: World) -> None:
        learner = _learner(world, _SMALL)
        for ask in (learner.freeze, learner.keep, lambda: learner.thaw({}), lambda: learner.keep_again({})):
            with pytest.raises(ValueError, match=f"rows of rank {world.rank} of 2, expected one rank"):
                ask()
        with pytest.raises(ValueError, match="expected one rank"):
            learner.choices(block.ids, block.numerics)
        assert learner.has_rows(np.zeros(1, np.int64)) is None
        with pytest.raises(ValueError, match="examples: 0 rows"):
            learner.prepare(block.take(slice(0)))  # on no rank

    on_ranks(2, work)


def test_some_ranks_may_compute_once_what_requests_share() -> None:
    together, apart = (blocks(CASES["items differ"], apart=apart, batches=3) for apart in (False, True))

    def work(world: World) -> tuple[list[Tensor], dict[str, Tensor]]:
        learner, scores = _learner(world, ModelConfig(), schema=REQUESTS), []
        learner._splits = Splits(REQUESTS, learner.config.table_dim, training=True, least_saved=1)
        for whole, single in zip(together, apart, strict=True):
            half = slice(0, 20) if world.rank == 0 else slice(20, None)
            if world.size == 1:
                batch = learner.prepare(single)
            else:
                batch = learner.prepare((whole if world.rank == 0 else single).take(half))
            assert (batch.requests is not None) == (world.size == 2 and world.rank == 0)
            scores.append(learner.step(batch).scores)
        return scores, learner.serving_state()

    ((expected, one),), ranks = on_ranks(1, work), on_ranks(2, work)
    for step, whole_scores in enumerate(expected):
        got = torch.cat([scores[step] for scores, _ in ranks])
        torch.testing.assert_close(got, whole_scores, rtol=1e-4, atol=1e-5)
    rows = {key: row for _, state in ranks for key, row in _rows(state).items()}
    wanted = _rows(one)
    assert rows.keys() == wanted.keys()
    for key, row in wanted.items():
        torch.testing.assert_close(rows[key], row, rtol=2e-3, atol=2e-4)


def _rows(state: dict[str, Tensor]) -> dict[int, Tensor]:
    return dict(zip(state["table.keys"].tolist(), state["table.embedding"], strict=True))
