"""Quantiles of a stream of positive numbers, in bounded memory."""

import math
import threading

import numpy as np
from numpy.typing import NDArray

from smes.events import I64

F64 = NDArray[np.float64]


class QuantileSketch:
    """Weighted counts in buckets whose bounds grow by 1 %: every quantile is exact to half a percent.

    Safe to share between threads.

    Args:
        smallest: Values below count as this, > 0.
        largest: Values above count as this.
    """

    _GROWTH = math.log(1.01)

    def __init__(self, smallest: float, largest: float) -> None:
        if not 0 < smallest < largest:
            raise ValueError(f"bounds {smallest} … {largest}, expected 0 < smallest < largest")
        self._smallest = smallest
        self._largest = largest
        self._counts = np.zeros(self._bucket(np.array([largest]))[0] + 1, np.int64)
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """Total weight added."""
        return int(self._counts.sum())

    def add(self, values: F64, weights: I64 | None = None) -> None:
        """Count values, each ``weights`` times (default once)."""
        buckets = self._bucket(values)
        with self._lock:
            np.add.at(self._counts, buckets, 1 if weights is None else weights)

    def quantile(self, q: float) -> float | None:
        """The smallest value with at least a share ``q`` of the weight at or below it; None when empty."""
        cumulative = self._counts.cumsum()
        if cumulative[-1] == 0:
            return None
        bucket = int(np.searchsorted(cumulative, max(1, math.ceil(q * cumulative[-1]))))
        return self._smallest * math.exp((bucket + 0.5) * self._GROWTH)

    def _bucket(self, values: F64) -> I64:
        clipped = np.clip(values, self._smallest, self._largest)
        return np.floor(np.log(clipped / self._smallest) / self._GROWTH).astype(np.int64)
