"""Schema files: YAML with ``name``, ``features``, ``derive``, ``tasks``, ``history`` and, for logs in files, ``log``.

Unknown keys are refused at every level. Every error is one line with file, key, value and what was expected.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from pydantic import ConfigDict

from smes.derived import spelled_out
from smes.schema import ITEM_ID, USER_ID, Derived, Feature, History, Schema, Task
from smes.schema_matching import Renames
from smes_io.log_spec import LogSpec
from smes_io.yaml_file import STRICT, read_mapping, validated

BuiltinName = Literal["kuairand", "synthetic"]


@dataclass(frozen=True)
class SchemaFile:
    """A schema and, if it describes a log in files, how that log is read.

    Attributes:
        name, tasks, features, history: As in :class:`smes.schema.Schema`.
        derive: Its derived features (:class:`smes.derived.Derived`).
        renamed: New names of features and tasks → the names that they had before. What was learned of them, and events
            of the schema before, are known by these (:mod:`smes.schema_change`).
        log: Files and columns of the log. None for a schema of live events only.

    Raises:
        ValueError: The log section names a task or feature that is not in the schema, or has no label for a task.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    tasks: tuple[Task, ...]
    features: tuple[Feature, ...] = ()
    history: History | None = None
    derive: tuple[Derived, ...] = ()
    renamed: Renames = field(default_factory=Renames)
    log: LogSpec | None = None

    def __post_init__(self) -> None:
        schema = self.schema
        if self.log is not None:
            _check_log(schema, self.log)

    @cached_property
    def schema(self) -> Schema:
        return Schema(self.name, self.tasks, self.features, self.history, self.derive)


def load_schema_file(path: str | Path) -> SchemaFile:
    """Read and check a schema file.

    Raises:
        ValueError: It cannot be read, is not a YAML mapping, or an entry is missing, unknown or out of range.
    """
    return validated(SchemaFile, _expand_shorthands(read_mapping(Path(path))), path)


@cache
def load_builtin(name: BuiltinName) -> SchemaFile:
    """Read one of the schema files that come with the package, once in a process."""
    with as_file(builtin_path(name)) as path:
        return load_schema_file(path)


def builtin_path(name: BuiltinName) -> Any:
    """The packaged YAML as an ``importlib.resources`` path, to read or to copy as a starting point."""
    if name not in get_args(BuiltinName):
        raise ValueError(f"built-in schema {name!r}, expected one of {', '.join(get_args(BuiltinName))}")
    return files("smes_io") / "schemas" / f"{name}.yaml"


def _check_log(schema: Schema, log: LogSpec) -> None:
    tasks = {t.name: t for t in schema.tasks}
    names = ", ".join(tasks)
    for name in log.labels:
        if name not in tasks:
            raise ValueError(f"log.labels.{name}: unknown task, expected one of {names}")
    for name, task in tasks.items():
        if name not in log.labels:
            raise ValueError(
                f"log.labels: task {name!r} has no label, expected one for each of {names}; where the log does not "
                "know the task, leave out section log, which only reading that log needs"
            )
        label = log.labels[name]
        floor = label.delay.at_least
        if floor is not None and (floor not in tasks or tasks[floor].kind != "regression"):
            raise ValueError(f"log.labels.{name}.delay.at_least: {floor!r}, expected a regression task in seconds")
        if label.threshold is not None and task.kind != "binary":
            raise ValueError(f"log.labels.{name}.threshold: {label.threshold}, expected none for a regression task")
    features = [f.name for f in schema.features if f.name not in (USER_ID, ITEM_ID)]
    derived = {d.name for d in schema.derived}
    for name in log.features:
        if name in derived:
            raise ValueError(f"log.features.{name}: a derived feature, expected no source for it")
        if name not in features:
            raise ValueError(f"log.features.{name}: unknown feature, expected one of {', '.join(features)}")
        if schema.history is not None and name in (schema.history.items, schema.history.outcomes):
            raise ValueError(
                f"log.features.{name}: part of the history, which the replay builds, expected no source for it"
            )


def _expand_shorthands(data: dict[str, Any]) -> dict[str, Any]:
    """Write out the short forms.

    ``x: name`` stands for ``x: {column: name}``, one pattern for a list of patterns, ``delimiter: ";"`` for
    ``csv: {delimiter: ";"}``, and in ``derive`` one name for a list of names.
    """
    if isinstance(derive := data.get("derive"), list):
        data = {**data, "derive": [spelled_out(entry) for entry in derive]}
    log = data.get("log")
    if not isinstance(log, dict):
        return data
    log = dict(log)
    for section in ("features", "labels"):
        if isinstance(log.get(section), dict):
            log[section] = {k: {"column": v} if isinstance(v, str) else v for k, v in log[section].items()}
    if isinstance(log.get("files"), str):
        log["files"] = [log["files"]]
    if "delimiter" in log and isinstance(log.get("csv", {}), dict) and "delimiter" not in log.get("csv", {}):
        log["csv"] = {**log.get("csv", {}), "delimiter": log.pop("delimiter")}
    for section in ("user_features", "item_features"):
        table = log.get(section)
        if isinstance(table, dict) and isinstance(table.get("files"), str):
            log[section] = {**table, "files": [table["files"]]}
    return {**data, "log": log}


def feature_columns(schema: Schema, log: LogSpec) -> Mapping[str, Literal["log", "user", "item"]]:
    """Map each declared feature to the table that it is read from.

    The user's and the item's own id and the features of the history are left out.
    """
    tables: dict[str, Literal["log", "user", "item"]] = {}
    built = () if schema.history is None else (schema.history.items, schema.history.outcomes)
    for feature in schema.features:
        if feature.name in (USER_ID, ITEM_ID, *built):
            continue
        if feature.source == "user" and log.user_features is not None:
            tables[feature.name] = "user"
        elif feature.source == "item" and log.item_features is not None:
            tables[feature.name] = "item"
        else:
            tables[feature.name] = "log"
    return tables
