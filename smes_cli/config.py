"""The one configuration file of a deployment, and environment variables over it.

Every component's part is a frozen dataclass beside the component. A variable overrides a key: ``SMES_`` and the key's
path in capitals, levels joined by two underscores, its value in YAML: ``SMES_EVENT_LOG__KIND=kafka``.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import ConfigDict

from feature_store.snapshots import SnapshotStoreConfig
from simulators.replay import ReplayConfig
from smes.errors import LogError
from smes.model.config import ModelConfig, OptimizerConfig
from smes_io.schema_file import BuiltinName, SchemaFile, load_builtin, load_schema_file
from smes_io.yaml_file import STRICT, read_mapping, validated
from smes_scorer.config import ScorerConfig
from stream.example_stream import StreamConfig
from stream.log.open_log import EventLogConfig
from trainer.config import TrainerConfig

PREFIX = "SMES_"
_BUILTIN: dict[str, BuiltinName] = {"kuairand": "kuairand", "synthetic": "synthetic"}


@dataclass(frozen=True)
class FeatureStoreConfig:
    """Where snapshots and entity features live.

    Attributes:
        redis_url: The Redis server, ``redis://[user:password@]host:port/database``.
        namespace: Deployments with different namespaces share a server without meeting.
        timeout_s: Longest wait for the server, at the start and for each answer, > 0.
        snapshots: Sizes and retention.
    """

    redis_url: str = "redis://127.0.0.1:6379/0"
    namespace: str = "smes"
    timeout_s: float = 10.0
    snapshots: SnapshotStoreConfig = field(default_factory=SnapshotStoreConfig)

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s {self.timeout_s}, expected more than 0 seconds")


@dataclass(frozen=True)
class Config:
    """Everything that a deployment can be told.

    Attributes:
        schema: A schema file, or the name of a built-in one (``kuairand``, ``synthetic``); None: found from the log
            where a command is given one.
        event_log, stream, model, optimizer, trainer, feature_store, scorer, replay: The components' parts.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    schema: str | None = None
    event_log: EventLogConfig = field(default_factory=EventLogConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    feature_store: FeatureStoreConfig = field(default_factory=FeatureStoreConfig)
    scorer: ScorerConfig = field(default_factory=ScorerConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)

    def schema_name(self, log: Path | None = None) -> str:
        """The schema in force: the name of a built-in one, or the path of a schema file.

        Args:
            log: The log that the command is given; decides where the configuration names no schema.

        Raises:
            ValueError: None is named and none can be told from the log.
            LogError: None is named, and there is no such log.
        """
        name = self.schema or (_schema_of(log) if log is not None else None)
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


def load_config(path: Path | None, environment: Mapping[str, str] = os.environ) -> Config:
    """Read the configuration.

    Args:
        path: The file; None: ``smes.yaml`` in the working folder where there is one, else the defaults.
        environment: Variables that override keys.

    Raises:
        ValueError: One line with file, key, value and what was expected.
    """
    if path is None and DEFAULT_FILE.exists():
        path = DEFAULT_FILE
    data = read_mapping(path) if path is not None else {}
    overridden = _override(data, environment)
    where = str(path) if path is not None else "configuration"
    if overridden:
        where += f" with {', '.join(overridden)}"
    return validated(Config, data, where)


def _override(data: dict[str, Any], environment: Mapping[str, str]) -> list[str]:
    """Put the variables' values into ``data``; the names used."""
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
            raise ValueError(f"environment variable {name}: {environment[name]!r}, expected a YAML value") from error
    return names


def _schema_of(log: Path) -> str | None:
    """The built-in schema that a log is of, told by the names of its files."""
    if log.is_dir() and any(log.glob("log_standard_*.csv")):
        return "kuairand"
    if log.suffix == ".parquet" and log.with_suffix(".truth.parquet").exists():
        return "synthetic"
    return None


# TODO(merge) was cli.starter: The commented starter configuration that ``smes init`` write

DEFAULT_FILE = Path("smes.yaml")
"""Where ``smes init`` writes it and the other commands look for it."""

STARTER = """\
# SMES Online: one file for every process. Every key is optional; what stands here is the default.
# An environment variable overrides a key: SMES_EVENT_LOG__KIND=kafka, SMES_SCORER__PORT=9000.

# The features and tasks: a schema file of yours, or a built-in one (kuairand, synthetic).
# `smes backtest` and `smes replay` can tell the built-in ones from the log.
schema: synthetic

event_log:
  kind: redis                                # redis (Redis Streams) or kafka
  redis_url: redis://127.0.0.1:6379/0
  kafka_bootstrap: 127.0.0.1:9092
  namespace: smes                            # deployments with different namespaces share a server
  partitions: 2                              # of each topic, when it is created

feature_store:                               # snapshots and entity features
  redis_url: redis://127.0.0.1:6379/0
  namespace: smes
  snapshots:
    retain_bytes: 536870912                  # the oldest snapshots go first
    min_retained: 2

stream:
  join:
    allowed_lateness_s: 1.0                  # how far out of order events may come; delays every example by as much
    remember_s: 600.0                        # how long ids are remembered after their example was emitted
  batch:
    size: 256
    max_age_s: 3600.0                        # event time; live traffic wants seconds, a fast replay hours
  events_per_read: 16384
  idle_after_s: 10.0                         # a partition without news for so long no longer holds the others back
  max_future_s: 300.0                        # an event later than its arrival by more than this is refused

model:
  ranker: smes                               # smes, or linear (the floor)
  embedding_dim: 16
  wide: true                                 # a linear part beside the ranker

optimizer:
  learning_rate: 0.001

trainer:
  device: auto                               # auto, cpu or cuda
  seed: 0
  snapshot_interval_s: 1.0
  checkpoint:
    directory: checkpoints                   # leave out to keep none: a restart then begins anew
    interval_s: 30.0
    keep: 2
  evaluation:
    window_s: null                           # event time scored by one frozen copy of the weights; null: a day, or
    window_examples: null                    # as long as the schema lets a user's history stand still

scorer:
  host: 127.0.0.1
  port: 8000
  fusion_weights: {}                         # task: weight; a task left out weighs 1 if binary, 0 if regression
  max_items: 1000
  max_body_bytes: 1048576

replay:
  speed: max                                 # event time per wall time; 1 is real time
  seed: 0
  codec: arrow                               # arrow or json
"""
