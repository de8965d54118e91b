"""What lies between the weights of two versions: rows that came, went and changed, and how far dense weights moved."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from feature_store.folding import read_weights
from feature_store.manifest import Manifest
from feature_store.snapshots import SnapshotStore
from smes.arrays import F32, I64

_ROWS_AT_ONCE = 65_536


@dataclass(frozen=True, slots=True)
class Distance:
    """How far some weights are apart.

    Attributes:
        rms: Root of the mean square of the differences.
        largest: The largest difference.
        relative: Norm of the differences over the norm of the first version's weights; None if that is 0.
    """

    rms: float
    largest: float
    relative: float | None


@dataclass(frozen=True, slots=True)
class VersionDifference:
    """The weights of version B against those of version A.

    Attributes:
        rows_before, rows_after: Rows of A, and of B.
        added, removed: Rows that only B has, and that only A has.
        changed: Rows of both whose weights differ in at least one bit.
        columns: Column group → distance over the changed rows; without rows that changed, empty.
        dense: Name of a dense tensor → distance; of the tensors that both have in one shape.
        dense_in_all: Distance over all of them, None without any.
        dense_other: Names of dense tensors that only one version has, or that have another shape.
    """

    rows_before: int
    rows_after: int
    added: int
    removed: int
    changed: int
    columns: Mapping[str, Distance]
    dense: Mapping[str, Distance]
    dense_in_all: Distance | None
    dense_other: tuple[str, ...]


def difference(store: SnapshotStore, a: Manifest, b: Manifest) -> VersionDifference:
    """Load two versions and compare them. Both are in memory at once.

    Raises:
        SnapshotError: As :func:`feature_store.folding.read_weights`.
    """
    return difference_of(read_weights(store, a)[0], read_weights(store, b)[0])


def difference_of(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> VersionDifference:
    """Compare two states as :meth:`smes.model.learner.Learner.serving_state` gives them, rows in any order."""
    keys_a: I64 = a["table.keys"].numpy()
    keys_b: I64 = b["table.keys"].numpy()
    _, at_a, at_b = np.intersect1d(keys_a, keys_b, assume_unique=True, return_indices=True)
    groups = sorted(n for n in a if n.startswith("table.") and n != "table.keys" and _same_columns(a[n], b.get(n)))
    changed = np.zeros(len(at_a), bool)
    sums = {group: _Sum() for group in groups}
    for start in range(0, len(at_a), _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        for group in groups:
            before: F32 = a[group].numpy()[at_a[some]]
            after: F32 = b[group].numpy()[at_b[some]]
            changed[some] |= (before.view(np.int32) != after.view(np.int32)).any(axis=1)
        for group in groups:
            rows = np.flatnonzero(changed[some])
            sums[group].add(a[group].numpy()[at_a[some][rows]], b[group].numpy()[at_b[some][rows]])
    dense_sum, dense, other = _Sum(), {}, []
    for name in sorted(n for n in a.keys() | b.keys() if n.startswith("dense.")):
        if name not in a or name not in b or a[name].shape != b[name].shape:
            other.append(name)
            continue
        one = _Sum()
        for each in (one, dense_sum):
            each.add(a[name].numpy(), b[name].numpy())
        if one.count:
            dense[name] = one.distance()
    return VersionDifference(
        rows_before=len(keys_a),
        rows_after=len(keys_b),
        added=len(keys_b) - len(at_b),
        removed=len(keys_a) - len(at_a),
        changed=int(changed.sum()),
        columns={group.removeprefix("table."): total.distance() for group, total in sums.items() if total.count},
        dense=dense,
        dense_in_all=dense_sum.distance() if dense_sum.count else None,
        dense_other=tuple(other),
    )


class _Sum:
    """Adds up differences, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._squares = self._squares_before = self._largest = 0.0

    def add(self, before: np.ndarray, after: np.ndarray) -> None:
        gap = np.abs(after.astype(np.float64) - before.astype(np.float64))
        self.count += gap.size
        self._squares += float((gap * gap).sum())
        self._squares_before += float((before.astype(np.float64) ** 2).sum())
        self._largest = max(self._largest, float(gap.max(initial=0.0)))

    def distance(self) -> Distance:
        relative = (self._squares / self._squares_before) ** 0.5 if self._squares_before else None
        return Distance((self._squares / self.count) ** 0.5, self._largest, relative)


def _same_columns(a: torch.Tensor, b: torch.Tensor | None) -> bool:
    return b is not None and a.shape[1:] == b.shape[1:]
