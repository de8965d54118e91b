"""``smes features``: user and item features of a log in the online store."""

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smes_cli.command_line import LogPath, SchemaName, config_of
from smes_cli.console import console, progress
from smes_cli.features_put import entity_store, features_get, features_put

if TYPE_CHECKING:
    from smes_cli.config import Config

features_app = typer.Typer(no_args_is_help=True, help="User and item features in the online store.")

features_app.command("put")(features_put)
features_app.command("get")(features_get)

_SAMPLE = 2000


@features_app.command("load")
def features_load(
    context: typer.Context,
    log: LogPath,
    schema: SchemaName = None,
    replace_all: Annotated[bool, typer.Option("--replace", help="First remove all stored features.")] = False,
) -> None:
    """Load the users' and items' features of a log into Redis. They hold from ever, until others with a time follow."""
    loaded = load_features(config_of(context, schema), log, replace=replace_all)
    console.print(f"features of {loaded['user']:,} users and {loaded['item']:,} items loaded", highlight=False)


def load_features(config: "Config", log: Path, *, replace: bool = False) -> dict[str, Any]:
    """Put every user's and item's features into Redis.

    Args:
        config: Its schema and feature store are used.
        log: The log that holds the features.
        replace: First remove all stored features.

    Returns:
        ``user`` and ``item``: how many of each were loaded. ``users_sample`` and ``items_sample``: sorted ids of the
        log's first impressions.

    Raises:
        LogError: The log cannot be read as its schema file says.
        FeatureStoreUnavailable: Redis did not answer within the configured wait.
    """
    import numpy as np

    from feature_store.entities import ALWAYS
    from simulators.logs.reader import ENTITIES, open_log

    schema_file = config.schema_file(log)
    loaded = {"user": 0, "item": 0}
    with (
        entity_store(config, schema_file.schema) as store,
        open_log(log, schema_file) as reader,
        progress("features", None) as advance,
    ):
        reader.check()  # before anything is removed or replaced
        if replace:
            store.clear()
        for block in chain.from_iterable(map(reader.entity_blocks, ENTITIES)):
            store.put_many(block.entity, block.ids, block.columns, ALWAYS)
            loaded[block.entity] += len(block.ids)
            advance(sum(loaded.values()), f"{loaded['user']:,} users, {loaded['item']:,} items")
        first = next(reader.blocks(_SAMPLE), None)
    return {
        **loaded,
        "users_sample": [] if first is None else np.unique(first.impressions.user_id).tolist(),
        "items_sample": [] if first is None else np.unique(first.impressions.item_id).tolist(),
    }
