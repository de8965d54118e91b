"""The benchmark of features measures what it says, in small."""

import redis

from benchmarks.feature_join import measure
from tests.running import valkey_server


def test_every_figure_is_there() -> None:
    with valkey_server() as server, redis.Redis.from_url(server.connection_url) as client:  # nobody else's memory
        figures = measure(client, {"user": 400, "item": 200}, repeats=1)

    assert len(figures) == 9
    assert min(figures.values()) > 0
    assert figures["memory_4_bytes_per_entity"] > 4 * 124
