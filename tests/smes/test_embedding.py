import numpy as np
import pytest
import torch

from smes.model.config import AdagradConfig
from smes.model.ids import readers
from smes.model.table import Readers, RowTable, read_cells

_CPU = torch.device("cpu")


@pytest.mark.parametrize("row_wise", [True, False])
def test_touched_rows_follow_adagrad_and_the_others_stay(row_wise: bool) -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(size=(50, 3)).astype(np.float32)
    table = RowTable(3, AdagradConfig(0.1, row_wise, initial_accumulator=0.2), _CPU)
    table.append(torch.from_numpy(first))
    weights, sums = first.astype(np.float64), np.full((50, 1 if row_wise else 3), 0.2)
    for step in range(4):
        rows = rng.permutation(50)[:7]
        leaf = table.gather(torch.from_numpy(rows))
        gradient = rng.normal(size=(7, 3)).astype(np.float32)
        leaf.grad = torch.from_numpy(gradient)
        table.update(torch.from_numpy(rows), leaf, torch.tensor(float(step + 1)))
        for row, g in zip(rows, gradient.astype(np.float64) * (step + 1), strict=True):
            sums[row] += (g**2).mean() if row_wise else g**2
            weights[row] -= 0.1 * g / np.sqrt(sums[row])
    torch.testing.assert_close(table.weights.double(), torch.from_numpy(weights), rtol=1e-5, atol=1e-6)


def test_elementwise_adagrad_equals_torchs() -> None:
    table = RowTable(4, AdagradConfig(0.05, row_wise=False, initial_accumulator=0.1), _CPU)
    first = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    table.append(first)
    reference = first.clone().requires_grad_()
    optimizer = torch.optim.Adagrad([reference], lr=0.05, initial_accumulator_value=0.1)
    rows = torch.arange(6)
    for step in range(3):
        target = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        leaf = table.gather(rows)
        (leaf - target).square().sum().backward()  # type: ignore[no-untyped-call]  # torch ships no type for it
        table.update(rows, leaf, torch.tensor(1.0))
        optimizer.zero_grad()
        (reference - target).square().sum().backward()  # type: ignore[no-untyped-call]  # torch ships no type for it
        optimizer.step()
    torch.testing.assert_close(table.weights, reference.detach())


def test_growth_keeps_weights_and_accumulators() -> None:
    table = RowTable(2, AdagradConfig(0.1, True, 0.5), _CPU)
    parts = [torch.full((n, 2), float(n)) for n in (1, 1500, 3, 5000)]
    for part in parts:
        table.append(part)
    assert torch.equal(table.weights, torch.cat(parts))
    assert torch.equal(table.accumulators, torch.full((6504, 1), 0.5))


def test_rows_of_another_width_are_refused() -> None:
    table = RowTable(2, AdagradConfig(0.1, True), _CPU)
    with pytest.raises(ValueError, match="expected 2"):
        table.load(torch.zeros(4, 3), torch.zeros(4, 1))


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="learning_rate: 0, expected more than 0"):
        AdagradConfig(0, True)
    with pytest.raises(ValueError, match="initial_accumulator: -1, expected at least 0"):
        AdagradConfig(0.1, True, -1)


def test_what_is_gathered_by_readers_is_what_is_scattered_without() -> None:
    rng = np.random.default_rng(3)
    cells = rng.integers(0, 40, (200, 5))
    cells[:, 1] = 7  # one row that every instance reads
    distinct, places = np.unique(cells, return_inverse=True)
    cells_BW = torch.from_numpy(places.reshape(cells.shape))
    order, start_U = (torch.from_numpy(array) for array in readers(cells_BW.numpy(), len(distinct)))
    first = torch.from_numpy(rng.normal(size=(len(distinct), 3)).astype(np.float32))
    by_cell = torch.from_numpy(rng.normal(size=(200, 5, 3)).astype(np.float32))
    leaves = [first.clone().requires_grad_() for _ in range(2)]
    for leaf, way in zip(leaves, (None, Readers(order, start_U)), strict=True):
        read = read_cells(leaf, cells_BW, way)
        assert torch.equal(read, first[cells_BW])
        (read * by_cell).sum().backward()  # type: ignore[no-untyped-call]  # torch has no type
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
