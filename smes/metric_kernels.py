"""Compiled loops of the metrics. N examples."""

import numpy as np
from numba import njit

from smes.arrays import F64, I64, Bool


@njit(cache=True, nogil=True)
def count_scores(
    bin_N: I64, predicted_N: F64, positive_N: Bool, counts: I64, predicted: F64, sums: F64
) -> None:  # pragma: no cover - compiled
    """Add examples to histograms of their scores: bit for bit what :func:`numpy.bincount` gives, added to them.

    Args:
        bin_N: The bin of each example.
        predicted_N: float64, above 0, what was predicted for it.
        positive_N: Whether its label is positive.
        counts: int64 [2, bins], negatives and positives; added to.
        predicted: float64 [bins], sum of predictions; added to.
        sums: float64 [bins] of zeros; zeros again afterwards.
    """
    for n in range(len(bin_N)):
        counts[1 if positive_N[n] else 0, bin_N[n]] += 1
        sums[bin_N[n]] += predicted_N[n]
    for n in range(len(bin_N)):
        predicted[bin_N[n]] += sums[bin_N[n]]
        sums[bin_N[n]] = 0.0


def compile_metric_kernels() -> None:
    """Compile these loops, or read them from numba's cache."""
    bins, one = np.zeros(2), np.zeros(1, np.int64)
    count_scores(one, np.ones(1), np.ones(1, np.bool_), np.zeros((2, 2), np.int64), bins, bins.copy())
