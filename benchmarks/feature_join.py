"""What features cost: to write them, to read them for a request, and to fill them into events that leave them out.

A real Redis (or Valkey) on this machine, 100,000 users and 50,000 items with eight features each: four ids, a bag of
eight and three numbers. Every figure is taken with one version of each entity and with four, interleaved, so that a
slow moment hits both; medians.

Run: ``python -m benchmarks.feature_join [--json FILE] [--users N] [--repeats N]``
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import redis
from numpy.typing import NDArray

from benchmarks.figures import save, show
from feature_store.entities import EntityStore
from feature_store.entity_layout import ENTITIES, Entity
from smes.arrays import I64
from smes.events import ImpressionBlock
from smes.schema import Feature, Schema, Task
from smes_cli.demo.local_servers import start_valkey
from smes_io.redis_client import connect
from trainer.stored_features import StoredFeatures

SCHEMA = Schema(
    "feature-join",
    (Task("click"),),
    tuple(
        feature
        for entity in ENTITIES
        for feature in (
            *(Feature(f"{entity}_id{i}", source=entity) for i in range(4)),
            Feature(f"{entity}_bag", "bag", source=entity, max_length=8),
            *(Feature(f"{entity}_number{i}", "numeric", source=entity) for i in range(3)),
        )
    ),
)
START_MS = 1_700_000_000_000
VERSIONS = (1, 4)
BLOCK, ITEMS_OF_REQUEST = 4096, 200


def columns(entity: Entity, n: int, rng: np.random.Generator) -> dict[str, NDArray[np.int64] | NDArray[np.float32]]:
    """Random features of N entities."""
    out: dict[str, NDArray[np.int64] | NDArray[np.float32]] = {
        f"{entity}_id{i}": rng.integers(0, 10**6, n) for i in range(4)
    }
    out[f"{entity}_bag"] = rng.integers(0, 10**6, (n, 8))
    return out | {f"{entity}_number{i}": rng.random(n, np.float32) for i in range(3)}


def write(store: EntityStore, counts: dict[Entity, int], versions: int, rng: np.random.Generator) -> float:
    """Write so many versions of every entity; rows a second."""
    rows, started_s = 0, time.perf_counter()
    for version in range(versions):
        for entity, count in counts.items():
            store.put_many(entity, np.arange(count), columns(entity, count, rng), START_MS + version)
            rows += count
    return rows / (time.perf_counter() - started_s)


def impressions(users: I64, items: I64, *, carried: bool, rng: np.random.Generator) -> ImpressionBlock:
    """Impressions that leave out all stored features, or carry all of them."""
    block = ImpressionBlock.empty(SCHEMA, len(users))
    block.event_time_ms[:] = START_MS + 10
    if carried:
        block.ids[:] = rng.integers(0, 10**6, block.ids.shape)
        block.numerics[:] = rng.random(block.numerics.shape)
    block.ids[:, 0], block.ids[:, 1] = users, items
    return block


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s


def measure(client: redis.Redis, counts: dict[Entity, int], repeats: int, seed: int = 0) -> dict[str, float]:
    """All figures."""
    rng = np.random.default_rng(seed)
    stores = {k: EntityStore(client, SCHEMA, f"bench{k}", keep=k) for k in VERSIONS}
    figures: dict[str, float] = {}
    for versions, store in stores.items():
        before = int(client.info("memory")["used_memory"])
        figures[f"write_{versions}_rows_per_s"] = write(store, counts, versions, rng)
        used = int(client.info("memory")["used_memory"]) - before
        figures[f"memory_{versions}_bytes_per_entity"] = used / sum(counts.values())
    samples: dict[str, list[float]] = {}
    for repeat in range(repeats):
        users, items = (rng.integers(0, counts[entity], BLOCK) for entity in ENTITIES)
        # as in a feed: a fifth of the entities has most of the traffic
        items = np.where(rng.random(BLOCK) < 0.8, items % (counts["item"] // 5), items)
        for versions, store in stores.items():
            features = StoredFeatures(SCHEMA, store)
            for carried in (True, False):
                block = impressions(users, items, carried=carried, rng=rng)
                seconds = timed(lambda: features.fill(block))  # noqa: B023 - called at once
                kind = "carried" if carried else f"left_out_{versions}"
                samples.setdefault(f"fill_{kind}_us_per_impression", []).append(1e6 * seconds / BLOCK)
            wanted = np.unique(items)[:ITEMS_OF_REQUEST]
            for _ in range(5):
                seconds = timed(lambda: store.get(repeat, wanted))  # noqa: B023 - called at once
                samples.setdefault(f"request_{versions}_ms", []).append(1e3 * seconds)
    return figures | {name: statistics.median(values) for name, values in samples.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args(arguments)
    counts: dict[Entity, int] = {"user": options.users, "item": options.users // 2}
    with (
        tempfile.TemporaryDirectory() as folder,
        start_valkey(Path(folder)) as server,
        connect(server.url, 60.0) as client,
    ):
        figures = measure(client, counts, options.repeats)
    show(figures)
    save(figures, options.json)


if __name__ == "__main__":
    main()
