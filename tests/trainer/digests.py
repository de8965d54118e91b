"""Digests of the weights that a small stream gives, by configuration and by loop."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from smes.events import FeedbackBlock, ImpressionBlock
from smes.model.config import ModelConfig, OptimizerConfig, model_preset
from smes.model.frozen_model import FrozenModel
from smes.model.learner import Learner
from stream.block_stream import BlockStream
from stream.codec.codec import encode_feedback, encode_impressions
from stream.dead_letters import DeadLetterWriter
from stream.example_stream import ExampleStream
from stream.log.memory_log import InMemoryLog
from stream.topics import FEEDBACK, IMPRESSIONS
from tests.fixtures.stored import digest
from tests.trainer.small_world import SCHEMA, STREAM, events, open_log
from trainer.config import EvaluationConfig
from trainer.evaluation import ProgressiveEvaluation
from trainer.loop import Trainer
from trainer.schedule import Flags
from trainer.stream import Stream

MODELS: dict[str, ModelConfig] = {
    "default": model_preset("default"),
    "paper": model_preset("paper"),
    "mmoe": replace(model_preset("default"), ranker="mmoe"),
}
EXAMPLES = 1280  # twenty whole batches
PARTITIONS = 2


def train_backtest(model: ModelConfig) -> Learner:
    """Train on the stream as ``smes backtest`` does: blocks in memory, until they end."""
    stream = BlockStream(SCHEMA, STREAM.join, STREAM.batch, _blocks())
    trainer = _trainer(model, stream)
    trainer.run(lambda: stream.ended and stream.upcoming() is None)
    assert trainer.trained == EXAMPLES
    return trainer.learner


def train_from_log(model: ModelConfig) -> Learner:
    """Train on the stream as ``smes train --drain`` does: everything that an event log holds."""
    log = _log()
    trainer = _trainer(model, ExampleStream(SCHEMA, STREAM, log, DeadLetterWriter(log)))
    trainer.run(lambda: True, drain=True)
    assert trainer.trained == EXAMPLES
    return trainer.learner


def weights_digest(learner: Learner) -> str:
    """Digest of everything that a restart of the learner needs."""
    return digest(learner.state())


def stream_digests() -> dict[str, str]:
    """Digest by configuration."""
    return {name: weights_digest(train_backtest(model)) for name, model in MODELS.items()}


def _trainer(model: ModelConfig, stream: Stream) -> Trainer:
    learner = Learner(SCHEMA, model, OptimizerConfig(), device=torch.device("cpu"))
    evaluation = ProgressiveEvaluation(
        SCHEMA,
        EvaluationConfig(window_s=10),
        freeze=lambda: FrozenModel.freeze(learner),
        thaw=lambda state: FrozenModel.thaw(learner, state),
    )
    return Trainer(learner, stream, evaluation, Flags())


def _blocks(rows: int = 300) -> Iterator[tuple[ImpressionBlock, FeedbackBlock]]:
    """Impressions and the feedback of the same period of event time, pair by pair."""
    impressions, feedback = events(EXAMPLES)
    start = 0
    for first in range(0, EXAMPLES, rows):
        block = impressions.take(slice(first, first + rows))
        is_last = first + rows >= EXAMPLES
        until_ms = block.event_time_ms[-1]
        stop = len(feedback) if is_last else int(np.searchsorted(feedback.event_time_ms, until_ms, side="right"))
        yield block, feedback.take(slice(start, stop))
        start = stop


def _log() -> InMemoryLog:
    """The stream on an event log, then one far later event per partition: all examples before it are complete."""
    log = open_log(PARTITIONS)
    impressions, feedback = events(EXAMPLES)
    log.append(IMPRESSIONS, encode_impressions(impressions, SCHEMA, "arrow", PARTITIONS))
    log.append(FEEDBACK, encode_feedback(feedback, SCHEMA, "arrow", PARTITIONS))
    later_ms = int(impressions.event_time_ms[-1]) + 60_000
    last_impressions, last_feedback = impressions.take(np.arange(64)), FeedbackBlock.empty(64)
    for block in (last_impressions, last_feedback):
        block.impression_id[:] = 10**6 + np.arange(64)  # enough ids that every partition gets some
        block.event_time_ms[:] = later_ms
    log.append(IMPRESSIONS, encode_impressions(last_impressions, SCHEMA, "arrow", PARTITIONS))
    log.append(FEEDBACK, encode_feedback(last_feedback, SCHEMA, "arrow", PARTITIONS))
    return log
