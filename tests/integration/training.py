"""Training on an event log, and the same training without any server to compare it with."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from feature_store.entity_layout import ENTITIES, own_features
from feature_store.snapshots import SnapshotStore
from simulators.logs.reader import open_log
from simulators.merge import replay_blocks
from smes.events import FeedbackBlock, ImpressionBlock
from smes.schema import MISSING
from smes_cli.building import build_evaluation, build_learner
from smes_cli.config import Config
from smes_cli.starting_point import WithoutCheckpoint
from smes_cli.train import run_train
from smes_io.redis_client import connect
from stream.codec.codec import Codec, encode_feedback, encode_impressions
from stream.dead_letters import DeadLetterWriter
from stream.example_stream import ExampleStream
from stream.log.event_log import EventLog
from stream.log.memory_log import InMemoryLog
from stream.log.open_log import open_event_log
from stream.topics import FEEDBACK, IMPRESSIONS
from trainer.loop import Trainer
from trainer.run_report import training_report
from trainer.schedule import Flags

Pairs = list[tuple[ImpressionBlock, FeedbackBlock]]


def read_pairs(config: Config, world: Path, rows_per_block: int = 200) -> Pairs:
    """Everything that a replay of ``world`` appends, in periods of event time."""
    with open_log(world, config.schema_file()) as reader:
        return list(replay_blocks(reader, seed=4, rows_per_block=rows_per_block))


def leave_features_out(config: Config, pairs: Pairs) -> tuple[Pairs, int]:
    """The same events, but impressions of odd users have neither the user's features nor the item's; how many."""
    schema, out, count = config.schema_file().schema, [], 0
    for impressions, feedback in pairs:
        odd = impressions.user_id % 2 == 1
        columns = {**impressions.arrays(), "ids": impressions.ids.copy(), "numerics": impressions.numerics.copy()}
        for entity in ENTITIES:
            for feature in own_features(schema, entity):
                if feature.kind == "numeric":
                    columns["numerics"][odd, schema.numeric_features.index(feature)] = np.nan
                else:
                    columns["ids"][odd, schema.id_slices[feature.name]] = MISSING
        out.append((ImpressionBlock(**columns), feedback))
        count += int(odd.sum())
    return out, count


def fill(config: Config, log: EventLog, pairs: Pairs, codec: Codec) -> None:
    """Append to both topics; creates them if they do not exist."""
    schema, partitions = config.schema_file().schema, config.event_log.partitions
    for topic in (IMPRESSIONS, FEEDBACK):
        log.ensure_topic(topic, partitions)
    for impressions, feedback in pairs:
        if len(impressions):
            log.append(IMPRESSIONS, encode_impressions(impressions, schema, codec, partitions))
        if len(feedback):
            log.append(FEEDBACK, encode_feedback(feedback, schema, codec, partitions))


def fill_servers(config: Config, pairs: Pairs, codec: Codec) -> None:
    """:func:`fill` on the event log that the configuration names."""
    with closing(open_event_log(config.event_log)) as log:
        fill(config, log, pairs, codec)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch in this context, as these tests configure: equal bits need equal numbers of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_in_process(config: Config, pairs: Pairs, *, flush: bool = False) -> Trainer:
    """A trainer that was never stopped, on a log in memory, after everything."""
    log = InMemoryLog()
    fill(config, log, pairs, "json")
    learner = build_learner(config, config.schema_file().schema)
    stream = ExampleStream(learner.schema, config.stream, log, DeadLetterWriter(log))
    trainer = Trainer(learner, stream, build_evaluation(config, learner), Flags())
    trainer.run(lambda: True, drain=True, flush=flush)
    trainer.settle()
    return trainer


def drain(
    config: Config, without_checkpoint: WithoutCheckpoint | None = None, *, flush: bool = False
) -> dict[str, Any]:
    """Train in this process, on the configured servers, on everything that is in the log; the report."""
    report = run_train(
        config,
        report=None,
        drain=True,
        skip_lost=False,
        should_stop=lambda: True,
        flush=flush,
        without_checkpoint=without_checkpoint,
    )
    assert report is not None, "of rank 0"
    return report.to_dict()


def totals(pairs: Pairs) -> tuple[int, int]:
    """Impressions and feedback events."""
    return sum(len(block) for block, _ in pairs), sum(len(feedback) for _, feedback in pairs)


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest sequence number."""
    return max(folder.glob("step-*.safetensors"), key=lambda path: path.stem.rpartition("-")[2], default=None)


def newest_step(folder: Path) -> int:
    """Step of the newest checkpoint, -1 without one."""
    newest = newest_checkpoint(folder)
    return -1 if newest is None else int(newest.stem.split("-")[1])


def learner_arrays(folder: Path) -> dict[str, NDArray[Any]]:
    """The learner's part of the newest checkpoint."""
    newest = newest_checkpoint(folder)
    assert newest is not None
    with safe_open(newest, framework="np") as file:
        names = [name for name in file.keys() if name.startswith("learner.")]  # noqa: SIM118 - no dict
        return {name.removeprefix("learner."): file.get_tensor(name) for name in names}


def assert_same_weights(checkpoints: Path, trainer: Trainer) -> None:
    """Weights, optimiser state and id table of a checkpoint are, bit for bit, those of a trainer."""
    got, expected = learner_arrays(checkpoints), trainer.learner.state()
    assert got.keys() == expected.keys()
    assert newest_step(checkpoints) == trainer.learner.step_number
    for name, tensor in expected.items():
        np.testing.assert_array_equal(got[name], tensor.numpy(), err_msg=name)


def assert_same_counts(report: dict[str, Any], trainer: Trainer) -> None:
    """Ledgers, metrics and experts of a report are those of a trainer."""
    expected = training_report(trainer, seconds=1, trained=1).to_dict()
    for section in ("schema", "version", "events", "feedback", "active_experts", "routing", "tasks"):
        assert report[section] == expected[section], section


@contextmanager
def snapshots_of(config: Config) -> Iterator[SnapshotStore]:
    """The snapshots where the configuration says."""
    with connect(config.feature_store.redis_url, 20.0) as client:
        yield SnapshotStore(client, config.feature_store.namespace)
