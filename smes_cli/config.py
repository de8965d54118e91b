"""The one configuration file of a deployment, and the environment variables that override it.

Each part is a frozen dataclass that lies beside the component it configures. A variable overrides a key. Its name is
``SMES_`` and the key's path in capitals, with two underscores between levels. Its value is YAML:
``SMES_EVENT_LOG__KIND=kafka``.

``model.preset`` is not a field of :class:`smes.model.config.ModelConfig`: it names the values that the other keys of
``model`` then change one by one.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import yaml
from pydantic import ConfigDict

from feature_store.config import FeatureStoreConfig
from simulators.config import ReplayConfig
from smes.errors import LogError, SmesError
from smes.model.config import ModelConfig, OptimizerConfig, Preset, model_preset
from smes.model.rows_config import RowsConfig
from smes.rankers.config import task_groups
from smes_console.config import ConsoleConfig
from smes_io.schema_file import BuiltinName, SchemaFile, load_builtin, load_schema_file
from smes_io.secrets import shown
from smes_io.yaml_file import STRICT, read_mapping, validated
from smes_scorer.config import ScorerConfig, check_names
from stream.config import StreamConfig
from stream.join.waits import stages_of
from stream.joined.config import ExamplesConfig
from stream.log.open_log import EventLogConfig
from trainer.config import TrainerConfig

DEFAULT_FILE = Path("smes.yaml")
"""Where ``smes init`` writes the configuration and the other commands look for it."""

PREFIX = "SMES_"
_BUILTIN: dict[str, BuiltinName] = {"kuairand": "kuairand", "synthetic": "synthetic"}


@dataclass(frozen=True)
class Config:
    """The configuration of a deployment.

    Attributes:
        schema: A schema file, or the name of a built-in one: ``kuairand`` or ``synthetic``. Null: a command that is
            given a log recognizes the built-in schemas by the log's files. A folder with ``log_standard_*.csv`` is
            KuaiRand, and a Parquet file with a ``.truth.parquet`` beside it is synthetic. ``train`` and ``serve`` are
            given no log and therefore need this key.
        event_log, stream, model, optimizer, rows, trainer, feature_store, scorer, examples, console, replay: The parts
            of the components.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    schema: str | None = None
    event_log: EventLogConfig = field(default_factory=EventLogConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    rows: RowsConfig = field(default_factory=RowsConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    feature_store: FeatureStoreConfig = field(default_factory=FeatureStoreConfig)
    scorer: ScorerConfig = field(default_factory=ScorerConfig)
    examples: ExamplesConfig = field(default_factory=ExamplesConfig)
    console: ConsoleConfig = field(default_factory=ConsoleConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)

    def schema_name(self, log: Path | None = None) -> str:
        """The schema to use: the name of a built-in one, or the path of a schema file.

        Args:
            log: The log that the command is given. It decides if the configuration names no schema.

        Raises:
            ValueError: No schema is named, and the log is not of a built-in one.
            LogError: No schema is named, and there is no such log.
        """
        name = self.schema or (_builtin_schema_of(log) if log is not None else None)
        if name is None and log is not None and not log.exists():
            raise LogError(f"{log}: no such file or folder, expected a log of impressions")
        if name is None:
            what = f"log {log}" if log is not None else "schema"
            raise ValueError(
                f"{what}: expected a schema file: name one with --schema, with the key 'schema' in the configuration, "
                f"or with {PREFIX}SCHEMA"
            )
        return name

    def schema_file(self, log: Path | None = None) -> SchemaFile:
        """The schema file that :meth:`schema_name` names.

        Raises:
            ValueError: As :meth:`schema_name`, or the file cannot be read.
        """
        name = self.schema_name(log)
        builtin = _BUILTIN.get(name)
        return load_builtin(builtin) if builtin else load_schema_file(name)


def load_config(path: Path | None, environment: Mapping[str, str] = os.environ, *, schema: str | None = None) -> Config:
    """Read the configuration.

    Args:
        path: The file. None: ``smes.yaml`` in the working folder if it is there, else the defaults.
        environment: Variables that override keys.
        schema: Overrides the configured one.

    Raises:
        ValueError: One line with file, key, value and what was expected.
    """
    if path is None and DEFAULT_FILE.exists():
        path = DEFAULT_FILE
    data = read_mapping(path) if path is not None else {}
    variables = _override(data, environment)
    where = str(path) if path is not None else "configuration"
    if variables:
        where += f" with {', '.join(variables)}"
    config = validated(Config, _with_preset(data, where), where, also={"model": ("preset",)})
    if schema is not None:
        config = replace(config, schema=schema)
    _check_names(config, where)
    return config


def _check_names(config: Config, where: str) -> None:
    """Check that the schema has the tasks and vocabularies that are named; without a schema, check nothing."""
    try:
        schema = config.schema_file().schema
    except (SmesError, ValueError):
        return  # the command that needs the schema says what is wrong with it
    try:
        stages_of(schema, config.stream.join.wait, config.stream.join.correction, lateness_ms=0)
        config.rows.rules(f.vocabulary_name for f in schema.inputs.id_features)
        if config.model.ranker == "home":
            task_groups("model.home.groups", schema, config.model.home.groups)
        elif config.model.ranker == "smes":
            task_groups("model.smes.groups.declared", schema, config.model.smes.groups.declared)
        check_names(config.scorer, schema)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _override(data: dict[str, Any], environment: Mapping[str, str]) -> list[str]:
    """Write the variables' values into ``data``, and return the names of the variables."""
    names = sorted(name for name in environment if name.startswith(PREFIX))
    for name in names:
        *parents, key = name.removeprefix(PREFIX).lower().split("__")
        section = data
        for parent in parents:
            below = section.setdefault(parent, {})
            if not isinstance(below, dict):
                raise ValueError(f"environment variable {name}: {parent!r} is a value, expected a section")
            section = below
        try:
            section[key] = yaml.safe_load(environment[name])
        except yaml.YAMLError as error:
            value = shown(name, environment[name])
            raise ValueError(f"environment variable {name}: {value}, expected a YAML value") from error
    return names


def _with_preset(data: dict[str, Any], where: str) -> dict[str, Any]:
    """Replace ``model.preset`` by the values that it names; the other keys of ``model`` override them."""
    model = data.get("model")
    if not isinstance(model, dict) or "preset" not in model:
        return data
    given = {key: value for key, value in model.items() if key != "preset"}
    try:
        preset = model_preset(cast(Preset, str(model["preset"])))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return {**data, "model": _overridden(preset, given)}


def _overridden(base: Any, given: Any) -> Any:
    """A dataclass as plain data, with the given keys in place of its own."""
    if not is_dataclass(base) or not isinstance(given, dict):
        return given
    own = {f.name: getattr(base, f.name) for f in fields(base)}
    parts = {name: _overridden(value, given.get(name, {})) for name, value in own.items() if is_dataclass(value)}
    return {**own, **given, **parts}


def _builtin_schema_of(log: Path) -> str | None:
    """The built-in schema of a log, recognized by the names of its files."""
    if log.is_dir() and any(log.glob("log_standard_*.csv")):
        return "kuairand"
    if log.suffix == ".parquet" and log.with_suffix(".truth.parquet").exists():
        return "synthetic"
    return None
