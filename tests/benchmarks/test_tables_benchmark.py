import numpy as np
import pytest
import torch

from benchmarks.table_step import TableBefore, TableNow, compare_steps, compare_table_part, draw, filled_table
from benchmarks.tables import lookups


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_the_compared_steps_do_the_same() -> None:
    table = filled_table(3300)
    now, before = TableNow(table), TableBefore(table)
    rows = np.arange(table.records.num_rows)
    first = table.records.values(rows)
    for ids in draw(3300, 5, power=3, seed=0):
        now.step(ids)
        before.step(ids)
    for name, weights in table.records.values(rows).items():
        np.testing.assert_allclose(weights, before.tables[name].weights.numpy(), rtol=1e-5, atol=1e-6)
        assert not np.array_equal(weights, first[name])


def test_every_id_of_a_batch_has_its_row_before_anything_is_timed() -> None:
    table = filled_table(3300)
    known = table.records.num_rows
    for ids in draw(3300, 3, power=1, seed=0):
        table.assign(ids, 0)
    assert table.records.num_rows == known


def test_figures_have_the_names_that_are_promised() -> None:
    part = compare_table_part(3300, rounds=1, steps=2)
    assert part["fused_vs_ops"] == pytest.approx(part["table_part_before_ms"] / part["table_part_ms"])
    steps = compare_steps(3300, 330, rounds=1, steps=1)
    assert steps["step_10m_vs_10k"] == pytest.approx(steps["step_large_ms"] / steps["step_small_ms"])
    found = lookups(40_000, rounds=1)
    assert found["lookups_m_per_s"] > 0
    assert 12 < found["map_bytes_an_id"] < 30
