"""A client of the real server, and what is closed at a test's end, for every test here."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import redis

from smes_io.redis_client import connect


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with connect(redis_url, 20.0) as client:
        yield client


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack
