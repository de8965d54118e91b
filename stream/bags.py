"""Ragged bags into the fixed columns of an ``ids`` matrix. Letters: N rows, L columns of the bag."""

import numpy as np

from smes.events import I64


def scatter_bags(out_NL: I64, values: I64, starts: I64, lengths: I64) -> None:
    """Write each row's bag from the left; longer bags are cut to L, the columns after a shorter one stay as they are.

    Args:
        out_NL: int64 [N, L], a view of the bag's columns, filled with ``MISSING``.
        values: int64, the elements of all bags.
        starts: int64 [N], where each row's elements begin in ``values``.
        lengths: int64 [N], how many elements each row has.
    """
    kept = np.minimum(lengths, out_NL.shape[1])
    rows = np.repeat(np.arange(len(kept)), kept)
    ends = np.cumsum(kept)
    columns = np.arange(len(rows)) - np.repeat(ends - kept, kept)
    out_NL[rows, columns] = values[np.repeat(starts, kept) + columns]
