"""A real trainer whose batches the clock ends, killed: the one after it repeats what the first had published."""

import os
import signal
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from feature_store.folding import read_weights
from feature_store.snapshots import SnapshotStore
from smes_cli.building import build_evaluation, build_learner
from smes_cli.config import Config
from stream.batch_journal import NAME, BatchJournal
from stream.dead_letters import DeadLetterWriter
from stream.example_stream import ExampleStream
from stream.log.event_log import EventLog
from stream.log.open_log import open_event_log
from tests.integration.training import fill_servers, newest_step, read_pairs, snapshots_of
from tests.running import DEADLINE_S, read_config, start_smes, until, until_log_says, write_config
from trainer.checkpoints import CheckpointDirectory
from trainer.loop import Trainer
from trainer.schedule import Flags

_FIRST = 72  # blocks until examples are complete


def restarted(config: Config, log: EventLog) -> Trainer:
    """What ``smes train`` makes of the checkpoints and the journal, in this process and without publishing."""
    folder = config.trainer.checkpoint.directory
    assert folder is not None
    learner = build_learner(config, config.schema_file().schema)
    journal = BatchJournal(folder / NAME, config.trainer.checkpoint.keep)
    stream = ExampleStream(learner.schema, config.stream, log, DeadLetterWriter(log), journal=journal)
    evaluation, checkpoints = build_evaluation(config, learner), CheckpointDirectory(folder, 2)
    trainer = Trainer(learner, stream, evaluation, Flags(), checkpoints=checkpoints)
    assert trainer.restore() is not None
    return trainer


def by_key(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights, the rows in the order of their keys."""
    order = torch.argsort(tensors["table.keys"])
    return {name: tensor[order] if name.startswith("table.") else tensor for name, tensor in tensors.items()}


def version_of(store: SnapshotStore) -> int:
    """The current version, -1 without one."""
    current = store.current()
    return -1 if current is None else current.version


def is_newer(store: SnapshotStore, than: int) -> bool:
    return version_of(store) > than


def reaches(trainer: Trainer, step: int) -> bool:
    """Take one step, or read; whether so many steps were taken."""
    if not trainer.step():
        trainer.stream.poll(0.05)
    return trainer.learner.step_number == step


@pytest.mark.timeout(400)
def test_a_killed_trainers_published_weights_come_again(
    redis_url: str, namespace: str, world: Path, tmp_path: Path
) -> None:
    # Events trickle in, so that the clock ends batches; a checkpoint comes early, and then none for long.
    path = write_config(
        tmp_path,
        redis_url,
        namespace,
        stream={"batch": {"size": 64, "max_wait_s": 0.02}},
        trainer={"checkpoint": {"interval_s": 300.0, "first_interval_s": 300.0}},
    )
    config, pairs = read_config(path), read_pairs(read_config(path), world, rows_per_block=20)
    fill_servers(config, [], "arrow")  # makes the topics
    output = tmp_path / "train.log"
    process = start_smes(output, "-c", str(path), "train")
    until_log_says(output, "training: waiting for events", process)
    folder = tmp_path / "checkpoints"
    with snapshots_of(config) as store:
        fill_servers(config, pairs[:_FIRST], "arrow")
        # Three blocks complete examples, and so make a version. What is left at the log's end may complete none.
        for number in range(_FIRST, len(pairs) - 2, 3):
            before = version_of(store)
            fill_servers(config, pairs[number : number + 3], "arrow")
            until(partial(is_newer, store, before), "another version")
        current = store.current()
        assert current is not None
        os.kill(process.pid, signal.SIGKILL)
        process.wait(DEADLINE_S)
        published, _ = read_weights(store, current)
    assert 0 < newest_step(folder) < current.version - 10
    ends = [int(line.split()[0]) for line in (folder / NAME).read_text().splitlines()]
    sizes = np.diff(ends)
    assert len({*sizes.tolist()}) > 5  # the clock ended many of them

    with closing(open_event_log(config.event_log)) as log:
        trainer = restarted(config, log)
        until(partial(reaches, trainer, current.version), "the step of the published version")

    repeated = by_key(trainer.learner.serving_state())
    assert repeated.keys() == published.keys()
    for name, tensor in by_key(published).items():
        assert torch.equal(tensor, repeated[name]), name
