"""``smes features load``: entity features of a log into the online store."""

from pathlib import Path
from typing import Any

import numpy as np

from feature_store.entities import EntityStore
from simulators.logs.reader import entity_features, open_log
from smes_cli.config import Config
from smes_cli.console import progress
from smes_io.redis_client import connect

_SAMPLE = 2000


def load_features(config: Config, log: Path, *, replace: bool = False) -> dict[str, Any]:
    """Put every user's and item's features into Redis.

    Args:
        config: Schema and feature store are used.
        log: Where the features are.
        replace: First remove what is there, features of another schema included.

    Returns:
        ``user`` and ``item``: how many of each were loaded; ``users_sample`` and ``items_sample``: ids of some that the
        log shows.

    Raises:
        SchemaMismatch: Features of another schema are there, and ``replace`` is false.
        LogError: The log cannot be read as its schema file says.
        FeatureStoreUnavailable: Redis is not reachable within the configured wait.
    """
    schema_file = config.schema_file(log)
    client = connect(config.feature_store.redis_url, config.feature_store.timeout_s)
    loaded = {"user": 0, "item": 0}
    try:
        store = EntityStore(client, schema_file.schema, config.feature_store.namespace)
        if replace:
            store.clear()
        with open_log(log, schema_file) as reader, progress("features", None) as advance:
            for entity, ids, columns in entity_features(reader, schema_file):
                store.put_many(entity, ids, columns)
                loaded[entity] += len(ids)
                advance(sum(loaded.values()), f"{loaded['user']:,} users, {loaded['item']:,} items")
            shown = next(reader.blocks(_SAMPLE), None)
    finally:
        client.close()
    empty = np.zeros(0, np.int64)
    return {
        **loaded,
        "users_sample": np.unique(shown.impressions.user_id).tolist() if shown is not None else empty.tolist(),
        "items_sample": np.unique(shown.impressions.item_id).tolist() if shown is not None else empty.tolist(),
    }
