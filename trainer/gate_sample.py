"""The newest examples that the publish gate judges by, in bounded memory.

Letters: N examples, T tasks, K tails.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smes.arrays import F32, F64, I64, Arrays, Bool
from trainer.gate_statistics import SUMS, terms


@dataclass(frozen=True, slots=True)
class Examples:
    """Examples, oldest first, each with the scores of two models that had not seen its labels.

    Attributes:
        user: int64 [N].
        odd: bool [N], whether a numeric feature lies far out of its range.
        labels: float32 [N, T].
        mask: bool [N, T].
        served: float32 [N, T], scores of the version in service.
        live: float32 [N, T], scores of the weights that are trained, just before their step.
    """

    user: I64
    odd: Bool
    labels: F32
    mask: Bool
    served: F32
    live: F32

    def __len__(self) -> int:
        return len(self.user)


_COLUMNS = ("user", "odd", "labels", "mask", "served", "live")


class SampledStretch:
    """The newest examples that were added, and sums over the newest of them (:mod:`trainer.gate_statistics`).

    Attributes:
        size: How many count at most.
        total: How many were added so far; an example's number is what ``total`` was before it.

    Args:
        size: As above.
        binary: bool [T], which tasks are binary.
    """

    def __init__(self, size: int, binary: Bool) -> None:
        self.size, self.total, self._binary = size, 0, binary
        self._parts: list[tuple[Examples, F64, F64]] = []  # as added; with the terms and their sums
        self._kept = 0  # examples in the parts: at least the newest ``size``, as far as there are any

    def add(self, part: Examples) -> None:
        """Add examples."""
        self.total += len(part)
        self._keep(part)

    def _keep(self, part: Examples) -> None:
        each = terms(part.served, part.labels, part.mask, self._binary)
        self._parts.append((part, each, each.sum(axis=0)))
        self._kept += len(part)
        while self._kept - len(self._parts[0][0]) >= self.size:
            self._kept -= len(self._parts.pop(0)[0])

    def length(self, number: int) -> int:
        """How many examples count from a number on."""
        return min(self.total - number, self._kept, self.size)

    def newest(self, length: int) -> Examples:
        """The newest examples."""
        parts, missing = [], length
        for part, _, _ in reversed(self._parts):
            if missing <= 0:
                break
            parts.append(part if missing >= len(part) else _newest(part, missing))
            missing -= len(part)
        parts.reverse()
        if not parts:
            return _newest(self._parts[-1][0], 0) if self._parts else _none(len(self._binary))
        return Examples(*(np.concatenate([getattr(part, name) for part in parts]) for name in _COLUMNS))

    def tail_sums(self, lengths: Sequence[int]) -> F64:
        """Sums over the newest examples, for K tails. float64 [K, 10, T]."""
        result = np.zeros((len(lengths), SUMS, len(self._binary)))
        for k, length in enumerate(lengths):
            missing = length
            for part, each, total in reversed(self._parts):
                if missing <= 0:
                    break
                result[k] += total if missing >= len(part) else each[-missing:].sum(axis=0)
                missing -= len(part)
        return result

    def state(self) -> Arrays:
        """Arrays from which :meth:`load_state` goes on, to the last bit of a sum."""
        kept = self.newest(self._kept)
        columns: Arrays = {name: getattr(kept, name) for name in _COLUMNS}
        lengths = np.array([len(part) for part, _, _ in self._parts], np.int64)
        return {**columns, "total": np.array([self.total]), "lengths": lengths}

    def load_state(self, state: Arrays) -> None:
        """The inverse of :meth:`state`."""
        self._parts, self._kept, self.total = [], 0, int(state["total"][0])
        columns = [state[name].copy() for name in _COLUMNS]
        ends = np.cumsum(state["lengths"])
        for start, stop in zip(ends - state["lengths"], ends, strict=True):
            self._keep(Examples(*(column[start:stop] for column in columns)))


def _newest(part: Examples, length: int) -> Examples:
    return Examples(*(getattr(part, name)[len(part) - length :] for name in _COLUMNS))


def _none(tasks: int) -> Examples:
    values = np.zeros((0, tasks), np.float32)
    return Examples(np.zeros(0, np.int64), np.zeros(0, np.bool_), values, values > 0, values, values)
