"""The training loop: take a batch, score it, train on it, and honour the schedules between two steps.

One thread owns the weights. Schedules only raise a flag; a cut is taken here, between two steps, so that weights,
optimiser state, id table, join state, positions and metrics are all of one moment.
"""

import logging
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from feature_store.manifest import Manifest
from smes.errors import CheckpointError, SnapshotNotFound
from smes.events import ExampleBlock
from smes.model.devices import RankBatch
from smes.model.learner import Learner, StepResult
from smes.schema import MISSING
from stream.log.event_log import Positions
from stream.mini_batches import Assembler
from trainer.checkpoints import Checkpoint, CheckpointDirectory
from trainer.evaluation import ProgressiveEvaluation
from trainer.publisher import Cut, Publisher, count_arrivals
from trainer.routing_figures import ExpertTally
from trainer.schedule import Flags

_logger = logging.getLogger(__name__)
_POLL_S = 0.2


class Stream(Protocol):
    """What brings batches: :class:`stream.example_stream.ExampleStream`, or blocks in memory for a backtest."""

    assembler: Assembler

    def poll(self, timeout_s: float) -> int:
        """Read once; the number of events read."""

    def end(self) -> Positions:
        """Where the log ends now."""

    def has_reached(self, end: Positions) -> bool:
        """Whether everything before ``end`` has been read."""

    def positions_by_topic(self) -> dict[str, dict[str, int]]:
        """Topic → partition → next record to read."""

    def state(self) -> dict[str, NDArray[Any]]:
        """Arrays from which ``load_state`` goes on."""

    def load_state(self, state: dict[str, NDArray[Any]]) -> None:
        """The inverse of ``state``."""


class Trainer:
    """Learner, stream and evaluation, stepped together.

    Args:
        learner: The weights; this object's thread owns them from now on.
        stream: Where batches come from.
        evaluation: Scores before each step.
        flags: Raised by schedules, honoured between two steps.
        checkpoints: Where checkpoints go; None keeps none.
        lineage: Name of a new history of weights.
        prefetch: Send the next batch to the device while a step runs there; None: where that overlaps (a GPU).
    """

    def __init__(
        self,
        learner: Learner,
        stream: Stream,
        evaluation: ProgressiveEvaluation,
        flags: Flags,
        *,
        checkpoints: CheckpointDirectory | None = None,
        lineage: str | None = None,
        prefetch: bool | None = None,
    ) -> None:
        self.learner, self.stream, self.evaluation = learner, stream, evaluation
        self.lineage = lineage or new_lineage()
        self.trained = 0
        self.experts = ExpertTally(learner.expert_limits)
        self._flags, self._checkpoints = flags, checkpoints
        self._publisher: Publisher | None = None
        self._arrivals: Counter[int] = Counter()
        self._event_time_ms: int | None = None
        self._cut_step = -1
        self._prefetch = learner.overlaps_copies if prefetch is None else prefetch
        self._prepared: tuple[ExampleBlock, RankBatch] | None = None
        self._unaccounted: tuple[ExampleBlock, StepResult] | None = None

    def restore(self) -> int | None:
        """Go on from the newest checkpoint, if there is one; its step.

        Raises:
            CheckpointError, SchemaMismatch: See :meth:`CheckpointDirectory.newest`.
        """
        if self._checkpoints is None:
            return None
        model = self.learner.config.to_dict()
        checkpoint = self._checkpoints.newest(schema_hash=self.learner.schema.hash, model=model)
        if checkpoint is None:
            return None
        names = ("learner", "stream", "evaluation", "experts", "trainer")
        parts: dict[str, dict[str, NDArray[Any]]] = {name: {} for name in names}
        for name, array in checkpoint.arrays.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = array
        try:
            self.learner.load_state({name: torch.from_numpy(array) for name, array in parts["learner"].items()})
            self.stream.load_state(parts["stream"])
            self.evaluation.load_state(parts["evaluation"])
            self.experts.load_state(parts["experts"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"checkpoint of step {checkpoint.step}: {error}") from error
        self.trained = int(parts["trainer"]["trained"][0])
        self.lineage = checkpoint.lineage
        return checkpoint.step

    def publish_to(self, open_publisher: Callable[[str], Publisher], current: Callable[[], Manifest | None]) -> None:
        """Publish cuts from now on.

        If serving already has a later version of this lineage, the trainer died after its last checkpoint and that
        history was interrupted: what follows is a lineage of its own, so that no version names two sets of weights.
        """
        try:
            served = current()
        except SnapshotNotFound:
            served = None
        if served is not None and served.lineage == self.lineage and served.version > self.learner.step_number:
            forked = new_lineage(self.lineage)
            _logger.warning(
                "version %d of lineage %s is served but the checkpoint is of step %d: going on as lineage %s",
                served.version,
                self.lineage,
                self.learner.step_number,
                forked,
            )
            self.lineage = forked
        elif served is not None and served.lineage != self.lineage:
            _logger.warning(
                "version %d of lineage %s is served; lineage %s takes its place with its first cut. If another trainer "
                "publishes that one, stop one of the two: serving follows whichever published last",
                served.version,
                served.lineage,
                self.lineage,
            )
        self._publisher = open_publisher(self.lineage)
        if self.learner.step_number:
            self.cut()

    def run(
        self,
        should_stop: Callable[[], bool],
        *,
        drain: bool = False,
        on_progress: Callable[["Trainer"], None] = lambda trainer: None,
    ) -> None:
        """Poll and train until told to stop, then cut, publish and checkpoint.

        Args:
            should_stop: Asked between two steps.
            drain: When told to stop, first read and train on everything that is in the log by then.
            on_progress: Called after every step and every read.

        Raises:
            EventLogError: The log could not be read within its bounded wait; the last checkpoint stands.
            CheckpointError: The last checkpoint could not be written.
        """
        while not should_stop():
            if not self.stream.assembler.ready:
                self.stream.poll(_POLL_S)
            while self.stream.assembler.ready and not should_stop():
                self._step_and_honour(on_progress)
            self.honour_flags()
            on_progress(self)
        if drain:
            end = self.stream.end()
            while self.stream.assembler.ready or not self.stream.has_reached(end):
                if not self.stream.assembler.ready:
                    self.stream.poll(_POLL_S)
                while self.stream.assembler.ready:
                    self._step_and_honour(on_progress)
        self.finish()

    def _step_and_honour(self, on_progress: Callable[["Trainer"], None]) -> None:
        self.step()
        self.honour_flags()
        on_progress(self)

    def step(self) -> None:
        """Score the first ready batch, then train on it."""
        self._look_at_routing()
        ready = self.stream.assembler.ready
        examples = ready[0]
        batch = self._take_prepared(examples)
        self.evaluation.before_step(examples)
        result = self.learner.step(batch)
        if self._prefetch and len(ready) > 1:
            # Its new ids get their rows before a cut that it is not part of: rows that nothing has trained yet, which
            # a restart finds and gives to the same ids.
            self._prepared = (ready[1], self.learner.prepare(ready[1]))
        # What the step before found out is fetched only now: on a GPU this overlaps with the step just launched.
        self._account()
        self._unaccounted = (examples, result)
        ready.popleft()
        self.trained += len(examples)
        self._event_time_ms = int(examples.event_time_ms[-1])
        arrived = examples.feedback_arrival_ms[examples.feedback_arrival_ms != MISSING]
        if self._publisher is not None:
            self._arrivals.update(count_arrivals(arrived))

    def _take_prepared(self, examples: ExampleBlock) -> RankBatch:
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared[0] is examples:
            return prepared[1]
        return self.learner.prepare(examples)

    def honour_flags(self) -> None:
        """Do what the schedules asked for since the last step."""
        if self._flags.take("snapshot"):
            self.cut()
        if self._flags.take("checkpoint"):
            try:
                self.checkpoint()
            except CheckpointError as error:
                _logger.error("%s; the checkpoint before it stands", error)

    def finish(self) -> None:
        """The last cut: published and on disk when this returns."""
        self.cut()
        try:
            self.checkpoint()
        finally:  # a full disk is no reason for serving to miss what was learned
            if self._publisher is not None and not self._publisher.close():
                _logger.error("the last snapshot, of step %d, was not published", self.learner.step_number)

    def cut(self) -> None:
        """Offer the weights of this moment to serving, unless they are those of the last cut."""
        if self._publisher is None or self.learner.step_number == self._cut_step:
            return
        self._cut_step = self.learner.step_number
        self._account()
        self._publisher.offer(
            Cut(
                tensors=self.learner.serving_state(),
                step=self.learner.step_number,
                positions=self.stream.positions_by_topic(),
                event_time_ms=self._event_time_ms,
                metrics={
                    "tasks": {name: asdict(metrics) for name, metrics in self.evaluation.progressive().items()},
                    "experts": self.experts.summary(),
                },
                feedback_arrivals=self._arrivals,
            )
        )
        self._arrivals = Counter()

    def checkpoint(self) -> None:
        """Write everything of this moment to disk.

        Raises:
            CheckpointError: The disk refused it.
        """
        if self._checkpoints is None:
            return
        self._account()
        arrays = {f"learner.{name}": tensor.numpy() for name, tensor in self.learner.state().items()}
        arrays |= {f"stream.{name}": array for name, array in self.stream.state().items()}
        arrays |= {f"evaluation.{name}": array for name, array in self.evaluation.state().items()}
        arrays["trainer.trained"] = np.array([self.trained])
        arrays |= {f"experts.{name}": array for name, array in self.experts.state().items()}
        schema_hash, model = self.learner.schema.hash, self.learner.config.to_dict()
        self._checkpoints.save(Checkpoint(self.lineage, self.learner.step_number, schema_hash, model, arrays))

    def published(self) -> dict[str, int | None]:
        """How many snapshots this process has published, and the bytes of the last one."""
        if self._publisher is None:
            return {"published": None, "bytes_last": None}
        return {"published": self._publisher.published, "bytes_last": self._publisher.bytes_last}

    def settle(self) -> None:
        """Account for the last step, so that metrics cover every trained example."""
        self._account()
        self._look_at_routing()

    def _look_at_routing(self) -> None:
        """Where a stretch of the routing's history ends: what the weights of this moment choose for its probe."""
        history = self.experts.history
        if not history.ends_with(pending=self._unaccounted is not None):
            return
        self._account()
        choices = self.learner.choices(*history.probe)
        assert choices is not None, "only a ranker that routes has a history of it"
        history.close(choices.cpu().numpy())

    def _account(self) -> None:
        if self._unaccounted is None:
            return
        examples, result = self._unaccounted
        self._unaccounted = None
        self.evaluation.after_step(examples, result.scores.cpu().numpy())
        if result.active_experts is not None and result.expert_load is not None:
            self.experts.add(examples, result.active_experts.cpu().numpy(), result.expert_load.cpu().numpy())


def new_lineage(parent: str | None = None) -> str:
    """A name for a new history of weights; a fork keeps the root of its parent's name."""
    root = parent.partition(".")[0] if parent else uuid.uuid4().hex[:8]
    return f"{root}.{uuid.uuid4().hex[:4]}" if parent else root
