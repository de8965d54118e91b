"""What the columns of features must satisfy, and what is computed from them, wherever they are filled.

Letters: N rows, W id columns, F numeric columns.
"""

import numpy as np

from smes.events import F32, I64, Bool
from smes.schema import MISSING, Schema

DAY_S = 86_400.0


def misaligned(ids_NW: I64, schema: Schema) -> Bool:
    """Rows with a sequence of another length than the one it accompanies. int64 [N, W] → bool [N]."""
    bad: Bool = np.zeros(len(ids_NW), np.bool_)
    for name, companions in schema.companions.items():
        present_NL = ids_NW[:, schema.id_slices[name]] != MISSING
        for companion in companions:
            bad |= ((ids_NW[:, schema.id_slices[companion.name]] != MISSING) != present_NL).any(axis=1)
    return bad


def fill_elapsed(numerics_NF: F32, schema: Schema, now_ms: I64 | int) -> None:
    """Turn stored times into the days from then to now, in place, where the schema says ``elapsed``.

    Args:
        numerics_NF: float32 [N, F].
        schema: Which columns.
        now_ms: Unix milliseconds, one or int64 [N].
    """
    for column, feature in enumerate(schema.numeric_features):
        if feature.elapsed:
            stored_s = numerics_NF[:, column].astype(np.float64)
            numerics_NF[:, column] = (np.asarray(now_ms) / 1000 - stored_s) / DAY_S
