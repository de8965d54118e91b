"""``smes features put`` and ``smes features get``: single rows, and those of a file."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smes.errors import SmesError
from smes_cli.command_line import SchemaOfEvents, config_of
from smes_cli.console import console, progress
from smes_cli.times import unix_ms_of, utc
from smes_io.clock import wall_clock_ms

if TYPE_CHECKING:
    from feature_store.entities import EntityStore, EntityVersion
    from feature_store.entity_layout import Entity
    from smes.schema import Schema
    from smes_cli.config import Config

EntityName = Annotated[str, typer.Argument(metavar="user|item", help="Whose features.")]
At = Annotated[
    str | None,
    typer.Option(
        "--time",
        help="From when the rows hold: 2026-11-27T20:00 (UTC), Unix milliseconds, an age as 15m, 2h, 7d, or always. "
        "Default: from now.",
    ),
]


def features_put(
    context: typer.Context,
    entity: EntityName,
    entity_id: Annotated[str | None, typer.Argument(metavar="[ID]", help="Id, an integer or a text.")] = None,
    values: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=VALUE]…",
            help="Features, ids of a bag with commas between them; or one JSON object. Those left out are missing.",
        ),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="Put every row of a JSON Lines or .parquet file instead.", exists=True)
    ] = None,
    time: At = None,
    id_column: Annotated[
        str | None, typer.Option(help="The file's column of ids; default: user_id or item_id.")
    ] = None,
    time_column: Annotated[
        str, typer.Option(help="The file's column of times in Unix milliseconds, if it has one.")
    ] = "time_ms",
    skip_unknown: Annotated[
        bool, typer.Option("--skip-unknown", help="Pass over columns of the file that are no features.")
    ] = False,
    schema: SchemaOfEvents = None,
) -> None:
    """Put the features of a user or an item, or of many, into Redis, with the time from which they hold."""
    kind = _entity(entity)
    config = config_of(context, schema)
    the_schema = config.schema_file().schema
    from feature_store.entity_layout import own_features

    if not own_features(the_schema, kind):
        raise ValueError(f"schema {the_schema.name!r}: no {kind} features, expected at least one")
    at_ms = wall_clock_ms() if time is None else _time_ms(time)
    if (file is None) == (entity_id is None):
        raise ValueError("features put: expected either an id and its features, or --file")
    if entity_id is not None:
        if not values:
            raise ValueError(
                f"features of {kind} {entity_id}: none, expected NAME=VALUE, or {{}} for a row without any"
            )
        row = _values(values, the_schema, kind)
        with entity_store(config, the_schema) as store:
            kept = store.put(kind, entity_id, row, at_ms)
        console.print(f"features of {kind} {entity_id} put", highlight=False, soft_wrap=True)
        _say_dropped(int(not kept), config)
        return
    from smes_cli.feature_files import FeatureFile, put_file

    assert file is not None, "there is either a file or an id"
    source = FeatureFile(file, id_column or f"{kind}_id", time_column, skip_unknown)
    with entity_store(config, the_schema) as store, progress("features", source.rows()) as advance:
        done, dropped = put_file(source, the_schema, kind, store.put_many, at_ms, advance)
    console.print(f"{done:,} rows of {kind} features put", highlight=False)
    _say_dropped(dropped, config)


def features_get(
    context: typer.Context,
    entity: EntityName,
    entity_id: Annotated[str, typer.Argument(metavar="ID", help="Id, an integer or a text.")],
    time: Annotated[
        str | None, typer.Option("--time", help="Show only the row that holds at this time; as for `features put`.")
    ] = None,
    schema: SchemaOfEvents = None,
) -> None:
    """Show the rows of features that Redis has of a user or an item, newest first, as JSON."""
    kind = _entity(entity)
    config = config_of(context, schema)
    at_ms = None if time is None else _time_ms(time)
    from feature_store.entity_values import entity_ids

    encoded = int(entity_ids([entity_id], f"{kind}_id")[0])
    with entity_store(config, config.schema_file().schema) as store:
        versions = store.versions(kind, encoded)
        broken = store.damage.last
    if at_ms is not None:
        versions = tuple(version for version in versions if version.time_ms <= at_ms)[:1]
    if broken is not None:
        raise SmesError(broken)
    if not versions:
        then = "" if time is None else f" that held at {time}"
        raise SmesError(f"{kind} {entity_id}: no features in Redis{then}")
    shown = {f"{kind}_id": encoded, "rows": [_shown(version) for version in versions]}
    console.print(json.dumps(shown, indent=2, ensure_ascii=False), highlight=False, soft_wrap=True)


def _entity(text: str) -> "Entity":
    if text == "user":
        return "user"
    if text == "item":
        return "item"
    raise ValueError(f"{text!r}: expected user or item")


def _time_ms(text: str) -> int:
    return 0 if text == "always" else unix_ms_of("--time", text, wall_clock_ms())


def _values(texts: list[str], schema: "Schema", entity: "Entity") -> dict[str, Any]:
    """Name → value, from one JSON object or from texts."""
    if len(texts) == 1 and texts[0].lstrip().startswith("{"):
        try:
            values = json.loads(texts[0])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"features {texts[0]!r:.60}: no JSON: {error}") from None
        return dict(values)
    features = {f.name: f for f in schema.features if f.source == entity}
    out: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{text!r}: expected NAME=VALUE, or one JSON object")
        if name in out:
            raise ValueError(f"{name}: given twice")
        feature = features.get(name)
        out[name] = value
        if feature is None:
            continue  # is named by who takes it
        if value == "":
            out[name] = None
        elif feature.is_list:
            out[name] = value.split(",")
        elif feature.kind == "numeric":
            try:
                out[name] = float(value)
            except ValueError:
                raise ValueError(f"{name}: {value!r}, expected a number") from None
    return out


def _shown(version: "EntityVersion") -> dict[str, Any]:
    since = "always" if version.time_ms == 0 else utc(version.time_ms)
    return {"time_ms": version.time_ms, "since": since, "features": version.values}


def _say_dropped(dropped: int, config: "Config") -> None:
    if dropped:
        keep = config.feature_store.feature_versions
        console.print(
            f"{dropped:,} of them not kept: the store has {keep} newer rows of the same entity "
            "(feature_store.feature_versions)",
            highlight=False,
            soft_wrap=True,
        )


@contextmanager
def entity_store(config: "Config", schema: "Schema") -> "Iterator[EntityStore]":
    """The configured store, while the block runs."""
    from feature_store.entities import EntityStore

    place = config.feature_store
    with place.connect() as client:
        yield EntityStore(client, schema, place.namespace, keep=place.feature_versions)
