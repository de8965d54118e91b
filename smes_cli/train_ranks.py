"""What a training of several ranks is built of, where it differs from that of one: see :mod:`trainer.rank_loop`."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

from smes.model.learner import Learner
from smes.schema import Schema
from smes.world import World
from smes_cli.config import Config
from stream.batch_journal import STEPS, BatchJournal
from stream.config import StreamConfig
from stream.dead_letters import DeadLetterWriter
from stream.example_stream import ExampleStream
from trainer.checkpoints import CheckpointDirectory
from trainer.evaluation import ProgressiveEvaluation
from trainer.part_uploader import PartUploader
from trainer.rank_loop import RankTrainer
from trainer.schedule import Flags
from trainer.shared_checkpoints import SharedCheckpoints
from trainer.stretches import Stretches

_logger = logging.getLogger(__name__)


def share_of_batches(config: StreamConfig, world: World) -> StreamConfig:
    """A rank's part of each batch: the configured size is that of all ranks together."""
    size = config.batch.size // world.size + (world.rank < config.batch.size % world.size)
    return config if world.size == 1 else replace(config, batch=replace(config.batch, size=size))


def shared_checkpoints(
    directory: CheckpointDirectory | None, world: World, stack: ExitStack
) -> SharedCheckpoints | None:
    """The folder that all ranks write to, locked by rank 0."""
    if directory is None:
        return None
    shared = SharedCheckpoints(directory, world)
    stack.enter_context(shared.locked())
    return shared


def evaluation_of_all(config: Config, schema: Schema) -> ProgressiveEvaluation:
    """Progressive evaluation without frozen weights: there is no windowed GAUC."""
    return ProgressiveEvaluation(schema, config.trainer.evaluation, freeze=None, thaw=None)


def rank_trainer(
    config: Config,
    world: World,
    learner: Learner,
    stream: ExampleStream,
    flags: Flags,
    *,
    evaluation: ProgressiveEvaluation,
    checkpoints: SharedCheckpoints | None,
    stretches: Stretches | None,
    letters: DeadLetterWriter,
    open_part: Callable[[], PartUploader],
) -> RankTrainer:
    """The trainer of one rank."""
    journal = None
    if world.rank == 0:
        _logger.warning(
            "%d ranks: the windowed GAUC and the routing over time are left out, for no rank has all rows", world.size
        )
        if checkpoints is not None:
            journal = BatchJournal(checkpoints.directory.directory / STEPS, config.trainer.checkpoint.keep)
    return RankTrainer(
        world,
        learner,
        stream,
        evaluation,
        flags,
        open_part=open_part,
        checkpoints=checkpoints,
        journal=journal,
        live_by_clock=config.stream.batch.max_wait_s is not None,
        stretches=stretches,
        max_failed_steps=config.trainer.max_failed_steps,
        dead_letters=letters.write,
    )
