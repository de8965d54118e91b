"""The first scores of a version, before it serves."""

import numpy as np

from feature_store.entities import blank_rows
from feature_store.manifest import Manifest
from smes.errors import SnapshotError
from smes.schema import Schema
from smes_scorer.versions import Scorable

_ITEMS = (1, 100)


def warm_up(model: Scorable, schema: Schema, manifest: Manifest) -> None:
    """Score as requests will, so that first-use compilation and allocation are done and a broken model shows.

    Raises:
        SnapshotError: A score is missing, or is no finite number; the message names the version of ``manifest``.
    """
    for n in _ITEMS:
        rows = blank_rows(schema, 0, np.arange(n))
        scores = model.score(rows.ids, rows.numerics, 0)
        if scores.shape != (n, schema.num_tasks) or not np.isfinite(scores).all():
            raise SnapshotError(
                f"snapshot {manifest.lineage}:{manifest.version}: warm-up gave scores of shape "
                f"{list(scores.shape)} or not all finite"
            )
