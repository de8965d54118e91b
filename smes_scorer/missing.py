"""Which features of a request had no value: neither the store nor the caller gave one.

Letters: N items, W id columns, F numeric columns.
"""

from typing import Annotated

import msgspec

from smes.arrays import F32, I64
from smes.feature_figures import FeatureColumns
from smes.schema import Schema

_Names = Annotated[list[str], msgspec.Meta(description="Their names.")]
_Counts = Annotated[dict[str, int], msgspec.Meta(description="Name → number of items without it.")]


class Missing(msgspec.Struct, gc=False):
    """The features that had no value, in the order of the schema. A list without ids counts as none.

    Attributes:
        user, context: Names of features of the user, and of the context.
        items: Name of a feature of the items → how many items had none.
    """

    user: _Names
    context: _Names
    items: _Counts


class MissingFeatures:
    """Finds the features without a value, for one schema. Safe to share between threads.

    Args:
        schema: The features.
    """

    def __init__(self, schema: Schema) -> None:
        self._columns = FeatureColumns(schema)
        self._features = schema.features

    def of(self, ids_NW: I64, numerics_NF: F32) -> Missing:
        """Those of a user with N items."""
        missing_NK = ~self._columns.filled(ids_NW, numerics_NF)
        found = Missing([], [], {})
        if not missing_NK.any():
            return found
        for feature, count in zip(self._features, missing_NK.sum(axis=0).tolist(), strict=True):
            if not count:
                continue
            if feature.source == "item":
                found.items[feature.name] = count
            else:
                (found.user if feature.source == "user" else found.context).append(feature.name)
        return found
