"""A small world on an in-memory log, and trainers over it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from smes.events import FeedbackBlock, ImpressionBlock
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.frozen_model import FrozenModel
from smes.model.learner import Learner
from smes.model.rows_config import RowsConfig
from smes.schema import Feature, Schema, Task
from stream.codec.codec import encode_feedback, encode_impressions
from stream.config import JoinConfig, MiniBatchConfig, StreamConfig
from stream.dead_letters import DeadLetterWriter
from stream.example_stream import ExampleStream
from stream.log.event_log import EventLog
from stream.log.memory_log import InMemoryLog
from stream.topics import FEEDBACK, IMPRESSIONS
from tests.smes.plain_smes import plain
from trainer.checkpoints import CheckpointDirectory
from trainer.config import EvaluationConfig
from trainer.evaluation import ProgressiveEvaluation
from trainer.gated_cuts import GatedCuts
from trainer.loop import Trainer
from trainer.routing_history import RoutingHistoryConfig
from trainer.schedule import Flags
from trainer.stretches import Stretches

SCHEMA = Schema(
    name="small",
    features=(Feature("tab"), Feature("tags", kind="bag", max_length=3), Feature("price", kind="numeric")),
    tasks=(Task("click", window_s=5), Task("like", window_s=10), Task("watch", kind="regression", window_s=8)),
)
MODEL = ModelConfig(
    embedding_dim=8, smes=plain({"experts.num": 4, "num_shared": 1, "num_adaptive": 1, "encoder_dims": (16,)})
)
# No partition may count as idle, and no batch as late, because the machine is slow.
STREAM = StreamConfig(
    join=JoinConfig(allowed_lateness_s=0.5),
    batch=MiniBatchConfig(size=64, max_wait_s=None),
    events_per_read=300,
    idle_after_s=3600,
)
START_MS = 1_700_000_000_000


def fill(log: EventLog, n: int, seed: int = 0, partitions: int = 2, *, first: int = 0) -> None:
    """``n`` impressions, 10 ms apart, and feedback that depends on user, item and tab.

    Args:
        log: Both topics have at least ``partitions`` partitions.
        n: Impressions.
        seed: Seed of everything random.
        partitions: Partitions that the events go to.
        first: The first impression's id, which also sets when it was.
    """
    impressions, feedback = events(n, seed, first)
    log.append(IMPRESSIONS, encode_impressions(impressions, SCHEMA, "json", partitions))
    log.append(FEEDBACK, encode_feedback(feedback, SCHEMA, "json", partitions))


def events(
    n: int, seed: int = 0, first: int = 0, *, longest_delay_ms: int = 4000
) -> tuple[ImpressionBlock, FeedbackBlock]:
    """What :func:`fill` appends, each in event-time order; feedback comes at most ``longest_delay_ms`` later."""
    rng = np.random.default_rng(seed)
    impressions = ImpressionBlock.empty(SCHEMA, n)
    impressions.impression_id[:] = first + np.arange(n)
    impressions.event_time_ms[:] = START_MS + 10 * (first + np.arange(n))
    impressions.ids[:, 0] = rng.integers(0, 40, n)
    impressions.ids[:, 1] = rng.integers(0, 60, n)
    impressions.ids[:, 2] = rng.integers(0, 3, n)
    impressions.ids[:, 3:5] = rng.integers(0, 9, (n, 2))
    impressions.numerics[:, 0] = rng.normal(size=n)
    logit = (impressions.ids[:, 0] % 5 + impressions.ids[:, 1] % 3) / 2 - 2
    positive = rng.random((n, 2)) < (1 / (1 + np.exp(-logit)))[:, None] * np.array([1, 0.3])
    rows, tasks = np.nonzero(np.c_[positive, rng.random(n) < 0.8])
    feedback = FeedbackBlock.empty(len(rows))
    feedback.impression_id[:] = impressions.impression_id[rows]
    feedback.task[:] = tasks
    feedback.value[:] = np.where(tasks == 2, rng.exponential(9, len(rows)), 1)
    feedback.event_time_ms[:] = impressions.event_time_ms[rows] + rng.integers(1, longest_delay_ms, len(rows))
    return impressions, feedback.take(np.argsort(feedback.event_time_ms, kind="stable"))


def open_log(partitions: int = 2) -> InMemoryLog:
    """An empty log."""
    log = InMemoryLog()
    for topic in (IMPRESSIONS, FEEDBACK):
        log.ensure_topic(topic, partitions)
    return log


def make_learner(seed: int = 1, rows: RowsConfig | None = None, optimizer: OptimizerConfig | None = None) -> Learner:
    """A learner that has learned nothing yet."""
    return Learner(SCHEMA, MODEL, optimizer or OptimizerConfig(), rows, device=torch.device("cpu"), seed=seed)


def make_trainer(
    log: EventLog,
    checkpoints: Path | None,
    *,
    prefetch: bool | None = None,
    learner: Learner | None = None,
    flags: Flags | None = None,
    routing: RoutingHistoryConfig | None = None,
    stream: ExampleStream | None = None,
    gated: GatedCuts | None = None,
    over_time: Callable[[ProgressiveEvaluation], Stretches] | None = None,
) -> Trainer:
    """A trainer that has trained on nothing yet; ``learner`` replaces the one of :func:`make_learner`.

    So does ``stream`` the one of ``log`` by :data:`STREAM`. ``over_time`` makes what observes the metrics over time.
    """
    learner, letters = learner or make_learner(), DeadLetterWriter(log)
    evaluation = ProgressiveEvaluation(
        SCHEMA,
        EvaluationConfig(window_s=10),
        freeze=lambda: FrozenModel.freeze(learner),
        thaw=lambda state: FrozenModel.thaw(learner, state),
    )
    return Trainer(
        learner,
        stream or ExampleStream(SCHEMA, STREAM, log, letters),
        evaluation,
        flags or Flags(),
        checkpoints=CheckpointDirectory(checkpoints, keep=2) if checkpoints else None,
        prefetch=prefetch,
        routing=routing,
        dead_letters=letters.write,
        gated=gated,
        stretches=over_time(evaluation) if over_time else None,
    )


def train_to_the_end(trainer: Trainer) -> None:
    """Train on every batch that the log gives, without cuts and checkpoints."""
    while trainer.step() or trainer.stream.poll(0) or trainer.stream.upcoming() is not None:
        pass
