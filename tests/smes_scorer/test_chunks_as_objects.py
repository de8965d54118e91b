"""A scorer and its arm serve versions whose chunks are objects; a damaged one is named, and the one before serves."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import redis

from feature_store.config import ChunksConfig
from feature_store.manifest import Manifest
from feature_store.objects import Objects
from feature_store.snapshots import SnapshotStore
from smes_scorer.config import ArmConfig


class Losing(Objects):
    """An object store that loses the last byte of each object."""

    def write(self, name: str, piece: bytes) -> None:
        super().write(name, piece[:-1])


def test_a_scorer_serves_objects_and_steps_over_damaged_ones(
    client: redis.Redis,
    namespace: str,
    tmp_path: Path,
    publish: Callable[..., Manifest],
    ready: Callable[..., AbstractContextManager[httpx.Client]],
    until: Callable[[Callable[[], object]], None],
) -> None:
    chunks = ChunksConfig(f"file://{tmp_path}")
    store, of_arm = (
        SnapshotStore(client, name, objects=Objects.of(chunks, name)) for name in (namespace, f"{namespace}-b")
    )
    publish(store, 1)
    publish(of_arm, 7)

    with ready(chunks=chunks, arms={"b": ArmConfig(namespace=f"{namespace}-b", share=0.5)}) as http:
        until(lambda: http.get("/health/ready").json()["arms"]["b"]["version"] == 7)
        versions = set()
        for user in range(20):
            versions.add(http.post("/v1/score", json={"user_id": user, "items": [13]}).json()["version"])
        assert versions == {1, 7}

        publish(SnapshotStore(client, namespace, objects=Losing(chunks.url, namespace)), 2)
        until(lambda: http.get("/health/ready").json()["problems"]["snapshots"])
        found = http.get("/health/ready").json()
        assert found["version"] == 1
        assert "snapshot a:2: chunk 0 of 1: " in found["problems"]["snapshots"]
        publish(store, 3)
        until(lambda: http.get("/health/ready").json()["version"] == 3)
