"""How well one feature alone tells a label: what tells too much is likely an outcome itself.

Letters: N rows.
"""

import numpy as np
from numpy.typing import NDArray

from smes.arrays import F64, I64

_BINS = 64
_PRIOR_ROWS = 4.0
SUSPECT_AUC = 0.95
"""A feature that alone tells a label this well is hardly known before the outcome."""

LEAST_EACH = 20
"""Positives and negatives without which nothing is said."""


def codes_of(values_N: NDArray[np.generic]) -> I64:
    """Number a feature's different values. Numbers of many different values go into 64 bins of equal counts, NaN apart.

    Args:
        values_N: Integers, texts or floats.

    Returns:
        int64 [N], from 0.
    """
    if values_N.dtype.kind != "f":
        places: I64 = np.unique(values_N, return_inverse=True)[1].astype(np.int64)
        return places
    present = np.isfinite(values_N)
    different = np.unique(values_N[present])
    edges = (
        different if len(different) <= _BINS else np.unique(np.quantile(values_N[present], np.arange(1, _BINS) / _BINS))
    )
    codes = np.searchsorted(edges, np.where(present, values_N, 0), side="right").astype(np.int64)
    codes[~present] = len(edges) + 1
    return codes


def auc(scores_N: F64, labels_N: F64) -> float | None:
    """The area under the ROC curve; equal scores count half. None with too few positives or negatives."""
    positives = int((labels_N > 0).sum())
    negatives = len(labels_N) - positives
    if min(positives, negatives) < LEAST_EACH:
        return None
    _, place, count = np.unique(scores_N, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[place]
    return float((ranks[labels_N > 0].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def alone(codes_N: I64, labels_N: F64) -> float | None:
    """AUC of a label's mean by value of one feature. Means come from every other row, the AUC from the rows between.

    A value that was not seen in the first rows stands for the mean of all. So an id that is new in each row tells
    nothing, and a value that goes with the label tells all, whether more of it means more of the label or not.

    Args:
        codes_N: The feature, numbered from 0 as by :func:`codes_of`.
        labels_N: 0 or 1.

    Returns:
        0 … 1; None with fewer than 20 positives or negatives.
    """
    known, asked = slice(0, None, 2), slice(1, None, 2)
    size = int(codes_N.max(initial=0)) + 1
    rows = np.bincount(codes_N[known], minlength=size)
    positives = np.bincount(codes_N[known], weights=labels_N[known], minlength=size)
    mean = float(labels_N[known].mean()) if len(labels_N[known]) else 0.0
    means = (positives + _PRIOR_ROWS * mean) / (rows + _PRIOR_ROWS)
    return auc(means[codes_N[asked]], labels_N[asked])
