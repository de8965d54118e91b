"""A client of the real server and a store in it, for every test here."""

from collections.abc import Iterator

import pytest
import redis

from feature_store.snapshots import SnapshotStore
from smes_io.redis_client import connect
from tests.feature_store.stores import make_store


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    client = connect(redis_url, 30.0)
    yield client
    client.close()


@pytest.fixture
def store(client: redis.Redis, namespace: str) -> SnapshotStore:
    return make_store(client, namespace)
