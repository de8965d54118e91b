"""Snapshot stores with small chunks."""

import redis

from feature_store.config import SnapshotStoreConfig
from feature_store.snapshots import SnapshotStore


def make_store(client: redis.Redis, namespace: str, **config: int) -> SnapshotStore:
    """A store whose payloads have several chunks, and otherwise what ``config`` says."""
    sizes = SnapshotStoreConfig(**{"chunk_bytes": 1000, **config})  # type: ignore[arg-type] # all are numbers
    return SnapshotStore(client, namespace, sizes)
