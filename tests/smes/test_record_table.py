"""The table against a dict of rows and a naive Adagrad in float64, on the host and by torch's operations."""

from collections.abc import Sequence
from threading import Event, Thread

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from smes.arrays import F32, I64
from smes.model.config import AdagradConfig
from smes.model.table import RecordTable
from smes.model.table_cuda import DeviceTable
from smes.model.table_host import HostTable
from smes.model.table_kernels import take_marked
from smes.model.table_layout import ColumnGroup, RecordLayout

GROUPS = (
    ColumnGroup("embedding", 19, AdagradConfig(0.1, row_wise=True, initial_accumulator=0.2)),
    ColumnGroup("wide", 8, AdagradConfig(0.05, row_wise=False, initial_accumulator=0.1)),
)


@pytest.fixture(params=["host", "device"])
def kind(request: pytest.FixtureRequest) -> str:
    assert isinstance(request.param, str)
    return request.param


@pytest.fixture
def table(kind: str) -> RecordTable:
    return open_table(kind)


def open_table(kind: str, groups: Sequence[ColumnGroup] = GROUPS) -> RecordTable:
    return HostTable(groups) if kind == "host" else DeviceTable(groups, torch.device("cpu"))


def first_weights(rng: np.random.Generator, count: int) -> dict[str, F32]:
    return {group.name: rng.normal(size=(count, group.columns)).astype(np.float32) for group in GROUPS}


class Batch:
    """Cells that read some rows, several of them the same."""

    def __init__(self, rng: np.random.Generator, rows: I64, shape: tuple[int, int]) -> None:
        self.rows_BW = rng.choice(rows, shape)
        distinct, places = np.unique(self.rows_BW, return_inverse=True)
        self.rows_U = torch.from_numpy(distinct)
        self.cells_BW = torch.from_numpy(places.reshape(shape))


class NaiveRows:
    """Weights and accumulators by row, float64."""

    def __init__(self) -> None:
        self.weights: dict[str, dict[int, np.ndarray]] = {group.name: {} for group in GROUPS}
        self.sums: dict[str, dict[int, np.ndarray]] = {group.name: {} for group in GROUPS}

    def reset(self, rows: I64, weights: dict[str, F32]) -> None:
        for group in GROUPS:
            for row, first in zip(rows.tolist(), weights[group.name], strict=True):
                self.weights[group.name][row] = first.astype(np.float64)
                self.sums[group.name][row] = np.full(group.accumulators, group.config.initial_accumulator)

    def step(self, rows_BW: I64, gradients: dict[str, F32], keep: dict[int, float], rate: dict[int, float]) -> None:
        for group in GROUPS:
            config = group.config
            for row in set(rows_BW.ravel().tolist()):
                g = gradients[group.name][rows_BW == row].astype(np.float64).sum(axis=0)
                sums = self.sums[group.name][row]
                sums[:] = config.initial_accumulator + (sums - config.initial_accumulator) * keep.get(row, 1)
                sums += (g**2).mean() if config.row_wise else g**2
                self.weights[group.name][row] -= config.learning_rate * rate.get(row, 1) * g / np.sqrt(sums)

    def check(self, table: RecordTable) -> None:
        for group in GROUPS:
            rows = sorted(self.weights[group.name])
            expected = np.stack([self.weights[group.name][row] for row in rows])
            actual = table.values(np.array(rows))[group.name]
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def take_step(
    table: RecordTable, batch: Batch, gradients: dict[str, F32], *, travel: bool = False, **options: torch.Tensor
) -> None:
    """Take a step; if rows travel, on copies of them, whose gradients come back in two parts."""
    if travel:
        cells = table.cells_of(table.weights(batch.rows_U), batch.cells_BW)
    else:
        cells = table.cells(batch.rows_U, batch.cells_BW)
    loss = sum((cells.values[name] * torch.from_numpy(gradient)).sum() for name, gradient in gradients.items())
    assert isinstance(loss, torch.Tensor)
    loss.backward()  # type: ignore[no-untyped-call]  # torch ships no type for it
    sums = table.gradients(len(batch.rows_U), cells, torch.tensor(1.0))
    if travel:
        places, half = torch.arange(len(batch.rows_U)).flip(0), sums.sums_US.flip(0) / 2
        sums = table.summed(len(batch.rows_U), places.repeat(2), half.repeat(2, 1))
        assert float(sums.square) == pytest.approx(float(sums.sums_US.square().sum()), rel=1e-5)
    table.update(batch.rows_U, sums, **options)


def test_steps_follow_adagrad_and_rows_are_reborn(table: RecordTable) -> None:
    rng, naive = np.random.default_rng(0), NaiveRows()
    for size in (1, 40, 3000):
        weights = first_weights(rng, size)
        table.reset(np.arange(size), weights)
        naive.reset(np.arange(size), weights)
        for step in range(4):
            batch = Batch(rng, np.arange(size), (20, 7))
            gradients = {g.name: rng.normal(size=(20, 7, g.columns)).astype(np.float32) for g in GROUPS}
            take_step(table, batch, gradients, travel=step % 2 == 1)
            naive.step(batch.rows_BW, gradients, {}, {})
    naive.check(table)


def test_accumulators_can_forget_and_rates_differ_by_row(table: RecordTable) -> None:
    rng, naive = np.random.default_rng(1), NaiveRows()
    weights = first_weights(rng, 30)
    table.reset(np.arange(30), weights)
    naive.reset(np.arange(30), weights)
    for _ in range(5):
        batch = Batch(rng, np.arange(30), (20, 7))
        gradients = {g.name: rng.normal(size=(20, 7, g.columns)).astype(np.float32) for g in GROUPS}
        keep, rate = (rng.uniform(0.2, 1.5, len(batch.rows_U)).astype(np.float32) for _ in range(2))
        keep = keep.clip(max=1)
        rows = batch.rows_U.tolist()
        take_step(table, batch, gradients, keep_U=torch.from_numpy(keep), rate_U=torch.from_numpy(rate))
        naive.step(batch.rows_BW, gradients, dict(zip(rows, keep, strict=True)), dict(zip(rows, rate, strict=True)))
    naive.check(table)


def test_views_show_the_table_of_their_moment(table: RecordTable) -> None:
    rng = np.random.default_rng(2)
    table.reset(np.arange(500), first_weights(rng, 500))
    opened = []
    for step in range(12):
        view = table.view()
        everything = np.arange(view.num_rows)
        opened.append((view, view.records(0, view.num_rows), table.values(everything), table.num_rows))
        batch = Batch(rng, np.arange(table.num_rows), (20, 7))
        take_step(table, batch, {g.name: rng.normal(size=(20, 7, g.columns)).astype(np.float32) for g in GROUPS})
        reborn = rng.choice(500 + 40 * step, 30, replace=False)
        reborn = np.unique(np.append(reborn, np.arange(500 + 40 * step, 540 + 40 * step)))
        table.reset(reborn, first_weights(rng, len(reborn)))
        for view, records, weights, num_rows in opened:
            rows = rng.permutation(num_rows)
            assert view.num_rows == num_rows
            assert np.array_equal(view.records(0, num_rows), records)
            assert all(np.array_equal(view.weights(rows)[name], weights[name][rows]) for name in weights)


def test_another_thread_may_read_a_view_while_rows_change() -> None:
    rng = np.random.default_rng(8)
    table = open_table("host")
    table.reset(np.arange(40_000), first_weights(rng, 40_000))
    view, before = table.view(), table.view().records(0, 40_000)
    stop, reads, wrong = Event(), [0], [0]

    def read() -> None:
        picked = np.random.default_rng(9)
        while not stop.is_set():
            rows = picked.permutation(40_000)[:20_000]
            wrong[0] += not np.array_equal(view.weights(rows)["wide"], before[rows, 19:27])
            wrong[0] += not np.array_equal(view.records(100, 39_900), before[100:39_900])
            reads[0] += 1

    thread = Thread(target=read)
    thread.start()
    try:
        while reads[0] < 20:
            batch = Batch(rng, np.arange(table.num_rows), (64, 7))
            take_step(table, batch, {g.name: np.ones((64, 7, g.columns), np.float32) for g in GROUPS})
            reborn = np.append(rng.choice(40_000, 100, replace=False), table.num_rows)
            table.reset(reborn, first_weights(rng, len(reborn)))
    finally:
        stop.set()
        thread.join()
    assert wrong == [0]
    view.close()


def test_views_come_back_with_a_table(table: RecordTable, kind: str) -> None:
    rng = np.random.default_rng(3)
    table.reset(np.arange(100), first_weights(rng, 100))
    view = table.view()
    before = view.records(0, 100)
    table.reset(np.arange(90, 130), first_weights(rng, 40))
    take_step(
        table,
        Batch(rng, np.arange(60), (20, 7)),
        {g.name: rng.normal(size=(20, 7, g.columns)).astype(np.float32) for g in GROUPS},
    )
    undo, now = view.undo(), table.view()
    view.close()
    again = open_table(kind)
    for start in range(0, 130, 50):
        again.put_records(start, now.records(start, min(start + 50, 130)))
    view = again.open_view(undo)
    again.reset(np.arange(10), first_weights(rng, 10))
    assert np.array_equal(view.records(0, 100), before)
    assert np.array_equal(again.view().records(10, 130), now.records(10, 130))


def test_gradients_may_lie_anyhow_in_memory(table: RecordTable) -> None:
    """Sums over columns share their gradient, concatenations leave gaps, and transposed ones have no order at all."""
    rng = np.random.default_rng(7)
    table.reset(np.arange(30), first_weights(rng, 30))
    batch = Batch(rng, np.arange(30), (20, 7))
    shared, gaps = (rng.normal(size=(20, n)).astype(np.float32) for n in (8, 7 * 19 + 4))
    for transposed in (False, True):
        cells = table.cells(batch.rows_U, batch.cells_BW)
        x = torch.cat([torch.zeros(20, 4), cells.values["embedding"].reshape(20, -1)], dim=1)
        loss = (x * torch.from_numpy(gaps)).sum() + (cells.values["wide"].sum(dim=1) * torch.from_numpy(shared)).sum()
        if transposed:
            turned = cells.values["wide"].transpose(0, 2).contiguous()
            loss = loss + (turned * torch.arange(8.0).view(8, 1, 1)).sum()
        loss.backward()  # type: ignore[no-untyped-call]  # torch ships no type for it
        expected = np.zeros((len(batch.rows_U), 27))
        by_cell = np.concatenate([gaps[:, 4:].reshape(20, 7, 19), np.repeat(shared[:, None], 7, 1)], axis=2)
        by_cell[:, :, 19:] += np.arange(8) * transposed
        np.add.at(expected, batch.cells_BW.numpy(), by_cell)
        sums = table.gradients(len(batch.rows_U), cells, torch.tensor(1.0)).sums_US
        np.testing.assert_allclose(sums.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_touched_rows_are_told_once(table: RecordTable) -> None:
    rng = np.random.default_rng(4)
    table.reset(np.arange(2000), first_weights(rng, 2000))
    assert sorted(table.take_touched().tolist()) == list(range(2000))
    touched: set[int] = set()
    for _ in range(3):
        batch = Batch(rng, np.arange(2000), (20, 7))
        take_step(table, batch, {g.name: np.ones((20, 7, g.columns), np.float32) for g in GROUPS})
        touched.update(batch.rows_U.tolist())
    table.reset(np.array([1990, 2100]), first_weights(rng, 2))
    assert sorted(table.take_touched().tolist()) == sorted(touched | {1990, 2100})
    assert len(table.take_touched()) == 0


def test_what_is_not_finite_shows_in_the_sum_of_squares(table: RecordTable) -> None:
    rng = np.random.default_rng(5)
    table.reset(np.arange(9), first_weights(rng, 9))
    batch = Batch(rng, np.arange(9), (4, 3))
    for bad, finite in ((1.0, True), (np.nan, False), (np.inf, False), (1e30, False)):
        cells = table.cells(batch.rows_U, batch.cells_BW)
        gradient = np.ones((4, 3, 19), np.float32)
        gradient[2, 1, 17] = bad
        (cells.values["embedding"] * torch.from_numpy(gradient)).sum().backward()  # type: ignore[no-untyped-call]
        sums = table.gradients(len(batch.rows_U), cells, torch.tensor(2.0))
        assert bool(sums.square.isfinite()) == finite
        if finite:
            by_row = np.zeros((len(batch.rows_U), 27))
            np.add.at(by_row[:, :19], batch.cells_BW.numpy().ravel(), gradient.reshape(-1, 19) * 2)
            np.testing.assert_allclose(sums.sums_US.numpy(), by_row)
            assert float(sums.square) == pytest.approx((by_row**2).sum())


def test_a_step_that_is_not_taken_changes_nothing(table: RecordTable) -> None:
    rng = np.random.default_rng(6)
    table.reset(np.arange(50), first_weights(rng, 50))
    before = table.view().records(0, 50)
    keep = torch.full((50,), 0.5)
    batch = Batch(rng, np.arange(50), (20, 7))
    gradients = {g.name: np.full((20, 7, g.columns), np.nan, np.float32) for g in GROUPS}
    take_step(table, batch, gradients, taken=torch.tensor(False), keep_U=keep[: len(batch.rows_U)])
    assert np.array_equal(table.view().records(0, 50), before)


def test_rows_of_another_shape_are_refused(table: RecordTable) -> None:
    with pytest.raises(ValueError, match=r"'wide': \(2, 8\)"):
        table.reset(np.arange(2), {"embedding": np.zeros((2, 19), np.float32), "wide": np.zeros((2, 4), np.float32)})
    with pytest.raises(ValueError, match="expected 36"):
        table.put_records(0, np.zeros((2, 35), np.float32))


def test_elementwise_adagrad_equals_torchs(kind: str) -> None:
    table = open_table(kind, [ColumnGroup("wide", 4, AdagradConfig(0.05, row_wise=False, initial_accumulator=0.1))])
    first = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    table.reset(np.arange(6), {"wide": first.numpy()})
    reference = first.clone().requires_grad_()
    optimizer = torch.optim.Adagrad([reference], lr=0.05, initial_accumulator_value=0.1)
    rows_U, cells_BW = torch.arange(6), torch.arange(6).view(6, 1)
    for step in range(3):
        target = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        cells = table.cells(rows_U, cells_BW)
        (cells.values["wide"].squeeze(1) - target).square().sum().backward()  # type: ignore[no-untyped-call]
        table.update(rows_U, table.gradients(len(rows_U), cells, torch.tensor(1.0)))
        optimizer.zero_grad()
        (reference - target).square().sum().backward()  # type: ignore[no-untyped-call]  # torch ships no type for it
        optimizer.step()
    torch.testing.assert_close(torch.from_numpy(table.values(np.arange(6))["wide"]), reference.detach())


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="learning_rate: 0, expected more than 0"):
        AdagradConfig(0, True)
    with pytest.raises(ValueError, match="initial_accumulator: -1, expected at least 0"):
        AdagradConfig(0.1, True, -1)
    with pytest.raises(ValueError, match="distinct names"):
        RecordLayout([GROUPS[0], GROUPS[0]])


def test_the_search_for_touched_rows_ends_at_the_last_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits lie in address space that is reserved for far more rows than there are."""
    monkeypatch.setattr("smes.reserved.SMALL_BYTES", 64)
    searched = []

    def take(bits: NDArray[np.uint64]) -> I64:
        searched.append(len(bits))
        rows: I64 = take_marked(bits)
        return rows

    monkeypatch.setattr("smes.model.table_host.take_marked", take)
    table = HostTable(GROUPS)
    table.reset(np.arange(2000), first_weights(np.random.default_rng(0), 2000))

    touched = table.take_touched()

    assert sorted(touched.tolist()) == list(range(2000))
    assert searched == [32]
