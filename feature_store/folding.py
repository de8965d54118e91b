"""The weights of a version as a whole: a full payload and the deltas after it, folded.

For what needs all weights in memory once, such as a trainer that goes on from a snapshot. A scorer applies the payloads
one by one (:mod:`smes_scorer.hot_swap`).
"""

from collections.abc import Sequence

import numpy as np
import torch

from feature_store.manifest import Manifest
from feature_store.payload import PayloadContent
from feature_store.payload_parts import read_published
from feature_store.snapshots import SnapshotStore
from smes.errors import SnapshotError
from smes.model.deltas import RowDelta, merged


def read_weights(store: SnapshotStore, manifest: Manifest) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a version.

    Returns:
        What :meth:`smes.model.learner.Learner.serving_state` returned at its cut, with the rows in any order; and the
        metadata of its payload.

    Raises:
        SnapshotError: What :meth:`feature_store.snapshots.SnapshotStore.chain` and ``pieces`` raise, or a payload that
            does not hold the weights of its version.
    """
    name = f"snapshot {manifest.lineage}:{manifest.version}"
    parts: list[RowDelta] = []
    content: PayloadContent | None = None
    for part in store.chain(manifest):
        content = read_published(store.pieces(part), part)
        said, found = (part.lineage, part.version, part.kind), (content.lineage, content.version, content.kind)
        if found != said:
            raise SnapshotError(f"{name}: its payload says {found[0]}:{found[1]}, {found[2]}, expected {said}")
        parts.append(_rows_of(content))
    assert content is not None, "a chain has at least one payload"
    base, *deltas = parts
    rows = merged(base, merged_all(deltas)) if deltas else base
    tensors = content.dense | {f"table.{group}": torch.from_numpy(column) for group, column in rows.columns.items()}
    return tensors | {"table.keys": torch.from_numpy(rows.keys)}, dict(content.metadata)


def merged_all(deltas: Sequence[RowDelta]) -> RowDelta:
    """One delta that changes a table as these do, one after the other; at least one."""
    some = list(deltas)
    while len(some) > 1:
        pairs = [some[i : i + 2] for i in range(0, len(some), 2)]
        some = [merged(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
    return some[0]


def _rows_of(content: PayloadContent) -> RowDelta:
    keys = np.empty(content.num_rows, np.int64)
    columns = {name: np.empty((content.num_rows, c), np.float32) for name, c in content.groups.items()}
    start = 0
    for some, values in content.rows():
        keys[start : start + len(some)] = some
        for name, column in columns.items():
            column[start : start + len(some)] = values[name]
        start += len(some)
    return RowDelta(keys, columns, content.removed)
