"""Which share of a task's positives comes after the task's wait: counted from the examples themselves, in their order.

Letters: N examples, T tasks.
"""

import numpy as np
from numba import njit

from smes.arrays import F32, F64, I8, Bool
from smes.events import CLOSING
from stream.join.waits import Correction, Stages

_HORIZON = 20_000.0
"""When so many positives were counted of a task, each counts half from then on: delays may change."""

_SOON = 50.0
"""What was seen so far counts as much as so many positives of closed impressions."""

ON_TIME, LATE, CLOSED_ON_TIME, CLOSED_LATE = range(4)
"""Columns of the counts: positives of examples that were emitted, and of impressions whose windows have closed."""


class LateShares:
    """The share of each task's positives that comes after its wait, as far as it is known.

    Impressions whose windows have closed tell it without bias, but late. Until there are many of them, the examples
    emitted so far tell most of it; they know too little of late positives, since those are still to come.

    Every example is counted after its own share was told, so the shares depend on the order of the examples alone.

    Args:
        stages: Which tasks have late positives that matter.
        correction: ``es_dfm`` counts; ``fnw`` takes all positives for late; ``none`` takes none.

    Attributes:
        counts: float64 [T, 4], the state.
    """

    def __init__(self, stages: Stages, correction: Correction) -> None:
        self._corrects, self._correction = stages.corrects, correction
        self.counts: F64 = np.zeros((len(stages.corrects), 4))

    def of_examples(self, kind: I8, label_mask: Bool, labels: F32, is_late: Bool) -> F32:
        """The late share of each label of some examples, which are then counted.

        Args:
            kind: int8 [N], as in :class:`smes.events.ExampleBlock`.
            label_mask: bool [N, T].
            labels: float32 [N, T], above 0 for a positive, 0 where masked.
            is_late: bool [N, T], whether the label came after its task's wait.

        Returns:
            float32 [N, T], 0 where there is no label, for tasks that wait for their window, and for regression.
        """
        shares: F32 = np.zeros(label_mask.shape, np.float32)
        if self._correction == "none" or not self._corrects.any():
            return shares
        cells = label_mask & self._corrects & (kind != CLOSING)[:, None]
        if self._correction == "fnw":
            shares[cells] = 1
        else:
            _tell_and_count(kind, cells, (labels > 0) & self._corrects, is_late, self.counts, shares)
        return shares


@njit(cache=True, nogil=True)
def _tell_and_count(
    kind: I8, cells: Bool, is_positive: Bool, is_late: Bool, counts: F64, shares: F32
) -> None:  # pragma: no cover - compiled
    """Fill the shares [N, T] and bring the counts [T, 4] up to date, one example after the other."""
    for i in range(cells.shape[0]):
        first = CLOSED_ON_TIME if kind[i] == CLOSING else ON_TIME
        for t in range(cells.shape[1]):
            if cells[i, t]:
                shares[i, t] = _share(counts[t])
            if is_positive[i, t]:
                counts[t, first + is_late[i, t]] += 1
                if counts[t, first] + counts[t, first + 1] >= _HORIZON:
                    counts[t, first] /= 2
                    counts[t, first + 1] /= 2


@njit(cache=True, nogil=True)
def _share(counts: F64) -> float:  # pragma: no cover - compiled
    seen = (counts[LATE] + 1) / (counts[ON_TIME] + counts[LATE] + 2)  # one positive of each kind is added
    closed = counts[CLOSED_ON_TIME] + counts[CLOSED_LATE]
    return float((counts[CLOSED_LATE] + _SOON * seen) / (closed + _SOON))
