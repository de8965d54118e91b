"""Boundaries of quantile buckets: quantiles of the numbers that the stream has brought so far.

A random sample of at most 8,192 numbers of each feature is kept, those with the smallest hashes of their place in the
stream (bottom-k sampling: Cohen and Kaplan, "Summarizing data using bottom-k sketches", PODC 2007). It does not depend
on chance, nor on how the stream is cut into batches. A quantile of it has a standard error of at most 0.6 % of the
stream, in rank.

Letters: B rows, K quantile buckets, Q boundaries, S numbers of a sample.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from smes.arrays import F32, I64, Arrays
from smes.derive import UNKNOWN, Derivations
from smes.hashing import splitmix64

if TYPE_CHECKING:
    from smes.joint_batch import JointBatch

_SAMPLE = 8192  # S
_NEW_SHARE = 8  # boundaries move when there are an eighth more numbers than at their last move
_LARGEST = 3e38


class StreamQuantiles:
    """The boundaries of a schema's quantile buckets. They move less and less, and stay after ``settle`` numbers.

    Args:
        derivations: Say which there are.

    Attributes:
        boundaries: float32 [Q]; :data:`smes.derive.UNKNOWN` before the first number. Replaced, never written to.
    """

    def __init__(self, derivations: Derivations) -> None:
        self._buckets, self._slices = derivations.quantiles, derivations.boundaries
        num_boundaries = max((s.stop for s in self._slices.values()), default=0)
        self.boundaries: F32 = np.full(num_boundaries, UNKNOWN, np.float32)
        shape = (len(self._buckets), _SAMPLE)
        self._values: F32 = np.zeros(shape, np.float32)
        self._places: I64 = np.zeros(shape, np.int64)
        self._seen: I64 = np.zeros(len(self._buckets), np.int64)
        self._moved_at: I64 = np.zeros(len(self._buckets), np.int64)

    def observe(self, bucketed_BK: F32, batch: "JointBatch | None" = None) -> bool:
        """Take in numbers in the order of the stream, NaN where missing; whether a boundary has moved.

        Args:
            bucketed_BK: Of several ranks, this one's part.
            batch: The batch of all ranks, whose rows come in the order of the ranks; None: there is one rank.
        """
        moved = False
        for k, bucket in enumerate(self._buckets):
            left = bucket.settle - int(self._seen[k])
            if left <= 0:
                continue
            x = bucketed_BK[:, k]
            x = x[~np.isnan(x)]
            if batch is None:
                x = x[:left]
                self._add(k, self._seen[k] + np.arange(len(x)), x, len(x))
            else:
                self._add_joint(k, x, left, batch)
            seen, before = int(self._seen[k]), int(self._moved_at[k])
            due = seen >= before + max(1, before // _NEW_SHARE) or seen >= bucket.settle
            if due and seen > before:
                self._move(k)
                moved = True
        return moved

    def settle(self) -> None:
        """Leave the boundaries as they are from now on, where there are any."""
        for k, bucket in enumerate(self._buckets):
            if self.boundaries[self._slices[bucket.name]][0] != UNKNOWN:
                self._seen[k] = self._moved_at[k] = bucket.settle

    def _add_joint(self, k: int, x: F32, left: int, batch: "JointBatch") -> None:
        """Of all ranks' numbers, only those travel that this rank's own sample would keep."""
        size, rank = batch.world.size, batch.world.rank
        counts_N = batch.gathered(np.array([len(x)]), [1] * size)
        start = int(counts_N[:rank].sum())
        x = x[: max(left - start, 0)]
        places = self._seen[k] + start + np.arange(len(x))
        if self._seen[k] >= _SAMPLE:
            kept = splitmix64(places) <= splitmix64(self._places[k]).max()
            places, x = places[kept], x[kept]
        found_N = batch.gathered(np.array([len(x)]), [1] * size).tolist()
        places, x = batch.gathered(places, found_N), batch.gathered(x, found_N)
        self._add(k, places, x, min(int(counts_N.sum()), left))

    def _add(self, k: int, places: I64, x: F32, seen: int) -> None:
        """Add numbers and their places to a sample; so many were seen."""
        held = min(int(self._seen[k]), _SAMPLE)
        places = np.concatenate([self._places[k, :held], places])
        values = np.concatenate([self._values[k, :held], np.clip(x, -_LARGEST, _LARGEST)])
        if len(places) > _SAMPLE:
            kept = np.sort(np.argpartition(splitmix64(places), _SAMPLE)[:_SAMPLE])
            places, values = places[kept], values[kept]
        self._places[k, : len(places)], self._values[k, : len(values)] = places, values
        self._seen[k] += seen

    def _move(self, k: int) -> None:
        bucket = self._buckets[k]
        assert bucket.quantiles is not None, "a quantile bucket"
        ordered = np.sort(self._values[k, : min(int(self._seen[k]), _SAMPLE)])
        boundaries = self.boundaries.copy()
        places = np.arange(1, bucket.quantiles) * len(ordered) // bucket.quantiles
        boundaries[self._slices[bucket.name]] = ordered[places]
        self.boundaries, self._moved_at[k] = boundaries, self._seen[k]

    def state(self) -> Arrays:
        """What training needs besides the boundaries; copies. Empty without quantile buckets."""
        return {name: array.copy() for name, array in self._own().items()} if self._buckets else {}

    def load(self, boundaries: F32, state: Mapping[str, np.ndarray]) -> None:
        """Continue from boundaries and a :meth:`state`; if it is empty, from boundaries that stay.

        Raises:
            KeyError: An array is missing.
            RuntimeError: One is of another shape.
        """
        self.boundaries = boundaries.copy()
        if not state:
            for array in self._own().values():
                array[...] = 0
            self.settle()
            return
        for name, array in self._own().items():
            if state[name].shape != array.shape:
                raise RuntimeError(f"quantiles.{name}: shape {list(state[name].shape)}, expected {list(array.shape)}")
            array[...] = state[name]

    def _own(self) -> Arrays:
        return {"values": self._values, "places": self._places, "seen": self._seen, "moved_at": self._moved_at}
