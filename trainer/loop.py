"""The training loop: score a batch, train on it, and between two steps do what the schedules requested.

One thread owns the weights. Schedules only raise flags. Cuts and checkpoints are taken here, between two steps, so that
weights, optimiser state, id table, join state, positions and metrics are all of one moment.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch

from feature_store.publication import Manifest
from smes.errors import FeatureStoreUnavailable, RankLost, SmesError, StepsNotFinite, Stopped
from smes.events import ExampleBlock
from smes.model.learner import Learner
from smes.model.memory_use import MemoryUse
from smes.model.rows_config import RowCounts
from smes.world import ALONE, World
from stream.dead_letters import DeadLetter
from trainer.arms_report import ArmTallies
from trainer.checkpoint_file import Checkpoint, CheckpointView
from trainer.checkpoint_writer import CheckpointWriter
from trainer.checkpoints import CheckpointDirectory
from trainer.cut_offers import CutOffers
from trainer.cuts import Cut
from trainer.evaluation import ProgressiveEvaluation
from trainer.failed_steps import DEFAULT_MAX_FAILED_STEPS, FailedSteps
from trainer.feature_figures import SampledFeatures
from trainer.gated_cuts import GatedCuts
from trainer.lineages import first_step_to_publish, lineage_to_publish, new_lineage
from trainer.observers import BatchSender, DelayedResults, Observer
from trainer.part_times import PartTimes
from trainer.publisher import Publisher
from trainer.report import RoutingSummary
from trainer.routing_figures import ExpertTally, RoutingObserver
from trainer.routing_history import RoutingHistoryConfig
from trainer.schedule import Flags
from trainer.schemas_before import SchemasBefore
from trainer.shared_checkpoints import SharedCheckpointWriter
from trainer.stream import Stream
from trainer.stretches import Stretches
from trainer.training_state import Progress, TrainingState

_logger = logging.getLogger(__name__)
_POLL_S = 0.2

SNAPSHOT, CHECKPOINT = "snapshot", "checkpoint"
"""Names of the flags that the loop takes."""


class Trainer:
    """Learner, stream and evaluation, stepped together.

    Attributes:
        trained: Impressions trained on, with those before a restart; each counts once, with its first example.
        not_finite: Impressions whose first step was not taken because loss or gradients were not finite, likewise.
        lineage: Name of this history of weights.
        ranks: How many ranks train together.
        experts: What the routing executed.
        arms: How well the scorer's arms served.
        offers: Offers its cuts for serving.
        schemas: From which the lineage was carried over.
        times: What the time goes to.
        writer: Writes checkpoints; None without a folder for them.
        failed: Counts steps that failed.

    Args:
        learner: The weights; the thread that runs this object owns them from now on.
        stream: Where batches come from.
        evaluation: Scores each batch before its step.
        flags: Raised by schedules, taken between two steps.
        checkpoints: Where checkpoints go; None keeps none.
        lineage: Name of a new history of weights; None for a random one.
        prefetch: Whether to send the next batch to the device while a step runs there. None: on a GPU only.
        routing: How finely the routing's history is kept; None for the default.
        observers: Further observers.
        max_failed_steps: So many steps in a row that are not finite stop the trainer.
        dead_letters: Where the examples of such steps go; None: they are only counted.
        gated: Judges the cuts; None: every cut is published.
        stretches: Observes the metrics over time; None: nobody does.
        world: The ranks that train together; :class:`trainer.rank_loop.RankTrainer` is for several.
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
        routing: RoutingHistoryConfig | None = None,
        observers: Sequence[Observer] = (),
        max_failed_steps: int = DEFAULT_MAX_FAILED_STEPS,
        dead_letters: Callable[[Sequence[DeadLetter]], None] | None = None,
        gated: GatedCuts | None = None,
        stretches: Stretches | None = None,
        world: World = ALONE,
    ) -> None:
        self.learner, self.stream, self.evaluation = learner, stream, evaluation
        self.lineage = lineage or new_lineage()
        self.trained = self.not_finite = 0
        self.experts = self._new_tally(routing)
        self.arms = ArmTallies(learner.schema)
        self._flags, self._checkpoints, self.ranks = flags, checkpoints, world.size
        self.writer: CheckpointWriter | SharedCheckpointWriter | None = (
            CheckpointWriter(checkpoints) if checkpoints else None
        )
        self.times = PartTimes()
        features = SampledFeatures(learner)
        ahead = learner.overlaps_copies if prefetch is None else prefetch
        self._sender = BatchSender(learner, ahead=ahead, first=features.see)
        self._observers: list[Observer] = []
        self._results = self._new_results()
        self._routing = RoutingObserver(learner, self.experts, self._results.deliver)
        self.failed = FailedSteps(max_failed_steps, self._forget, dead_letters)
        self.gated = gated
        gate = gated.gate if gated else None
        told_first = [
            self._routing,
            evaluation,
            *([stretches] if stretches else []),
            self.arms,
            *([gate] if gate else []),
        ]
        self._observers += [*told_first, *observers, self.failed]
        self._state = TrainingState(
            learner, stream, evaluation, self.experts, self.arms, gate, stretches, rank=world.rank
        )
        if stretches is not None:
            stretches.follow(lambda: (learner.step_number, self.trained, self._event_time_ms))
        self.schemas = SchemasBefore()
        self._event_time_ms: int | None = None
        self.offers = CutOffers(
            self._state,
            features,
            gated,
            event_time_ms=lambda: self._event_time_ms,
            deliver=self._results.deliver,
            forget_sent=self._sender.forget,
            world=world,
        )

    def _new_tally(self, routing: RoutingHistoryConfig | None) -> ExpertTally:
        return ExpertTally(self.learner.expert_limits, routing)

    def _new_results(self) -> DelayedResults:
        return DelayedResults(self._observers)

    @property
    def _joint_steps(self) -> int | None:
        """Steps of several ranks; None of one."""
        return None

    @property
    def publisher(self) -> Publisher | None:
        """Publishes cuts for serving; None until :meth:`publish_to`."""
        return self.offers.publisher

    @property
    def cut_ms(self) -> int | None:
        """When the newest cut was taken, Unix milliseconds; None before the first one of this process."""
        return self.offers.cut_ms

    @property
    def row_counts(self) -> RowCounts:
        """How many rows ids have, and what became of those that they had."""
        return self.learner.row_counts

    @property
    def num_rows(self) -> int:
        """Number of rows of the id table in use."""
        return self.learner.num_rows

    @property
    def memory(self) -> MemoryUse:
        """How much memory the learner's parts take."""
        return self.learner.memory

    @property
    def event_time_ms(self) -> int | None:
        """Event time of the newest example trained on; None before the first."""
        return self._event_time_ms

    def observe(self, observer: Observer) -> None:
        """Add an observer of the steps from now on."""
        self._observers.append(observer)

    def restore(self, carried_over: Callable[[Checkpoint], Checkpoint] | None = None) -> int | None:
        """Continue from the newest checkpoint and return its step; None if there is no checkpoint.

        Args:
            carried_over: Makes a checkpoint of the present schema of one of another schema. It is on disk when this
                returns; the other one stays until then. None: a checkpoint of another schema is refused.

        Raises:
            CheckpointError, SchemaMismatch: See :meth:`CheckpointDirectory.newest`, and what ``carried_over`` raises.
        """
        if self._checkpoints is None:
            return None
        schema, model = self.learner.schema, self.learner.config.to_dict()
        checkpoint = self._checkpoints.newest(schema=schema, model=model, any_schema=carried_over is not None)
        if checkpoint is None:
            return None
        other = checkpoint.schema_hash != schema.hash
        if other:
            assert carried_over is not None, "else it was refused"
            checkpoint = carried_over(checkpoint)
        self.prime(checkpoint)
        self.lineage = checkpoint.lineage
        if other or not checkpoint.on_disk:
            self.checkpoint()
        return checkpoint.step

    def prime(self, checkpoint: Checkpoint) -> None:
        """Go on from the state in a checkpoint, as a lineage of one's own.

        Raises:
            CheckpointError: It lacks something, or does not fit.
        """
        progress = self._state.load(checkpoint)
        self.trained, self.not_finite, self._event_time_ms = (
            progress.trained,
            progress.not_finite,
            progress.event_time_ms,
        )
        self.schemas = progress.schemas

    def start_from(self, tensors: Mapping[str, torch.Tensor], served: Manifest) -> None:
        """Go on from the weights of a snapshot, as a fork of its lineage. The optimisers begin anew.

        Args:
            tensors: The snapshot's weights.
            served: Its manifest.

        Raises:
            ValueError: They are of another schema or model configuration.
        """
        self.learner.load_serving_state(tensors, served.step)
        self.lineage = new_lineage(served.lineage)
        self.schemas = SchemasBefore(served.carried_from)

    def publish_to(
        self,
        open_publisher: Callable[[str], Publisher],
        served: Manifest | None,
        *,
        listed: Sequence[Manifest] = (),
        unreadable: bool = False,
        steps_before_replacing: int = 1,
    ) -> None:
        """Publish cuts from now on, and the present weights at once if they have learned anything.

        Args:
            open_publisher: Opens a publisher for a lineage.
            served: Manifest of the snapshot that is served; see :func:`trainer.lineages.lineage_to_publish`.
            listed: The snapshots that the store has.
            unreadable: Whether there is a snapshot whose manifest cannot be read.
            steps_before_replacing: Steps before weights of this lineage replace those of a lineage that it does not
                descend from, ≥ 1.
        """
        self.lineage = lineage_to_publish(self.lineage, self.learner.step_number, served, listed)
        first_step = first_step_to_publish(
            self.lineage, served, unreadable=unreadable, steps_before_replacing=steps_before_replacing
        )
        self.offers.open(open_publisher(self.lineage), first_step)
        self.observe(self.offers.arrivals)
        if self.learner.step_number:
            self.cut()

    def run(
        self,
        should_stop: Callable[[], bool],
        *,
        drain: bool = False,
        flush: bool = False,
        on_saved: Callable[[], object] | None = None,
    ) -> None:
        """Read and train until ``should_stop``, then cut, checkpoint and publish.

        The same is done after an error of the event log: nothing trained on is lost.

        Args:
            should_stop: Asked between two steps.
            drain: Before stopping, read and train on everything that is in the log by then.
            flush: After that, end the stream: train on what still waits for feedback, too.
            on_saved: Called when the last checkpoint is on disk, before the last snapshot is waited for.

        Raises:
            EventLogError: The log could not be read within its bounded wait.
            StepsNotFinite: Several steps in a row were not finite. No checkpoint was written since.
            RankLost: Another rank of the training is gone. No checkpoint was written.
            LeaseLost: Another trainer publishes in this namespace.
            CheckpointError: The last checkpoint could not be written.
            FeatureStoreUnavailable: The last snapshot could not be published. The checkpoint is on disk.
        """
        try:
            try:
                self._train(should_stop, drain=drain, flush=flush)
            except Stopped as stopped:
                _logger.warning("%s", stopped)
            self._deliver_last()
        except RankLost:  # nothing can be done together any more; the checkpoint is the last one
            raise
        except StepsNotFinite:
            if self.writer is not None:
                self.writer.wait()
            self._close_publisher()
            raise
        except SmesError:
            try:
                self.finish(on_saved)
            except SmesError as second:
                _logger.error("%s", second)
            raise
        self.finish(on_saved)

    def _train(self, should_stop: Callable[[], bool], *, drain: bool, flush: bool) -> None:
        before, is_first = self.learner.step_number, True
        while not should_stop():
            self._advance()
            if is_first and self.learner.step_number > before:
                self._flags.request(CHECKPOINT)  # a trainer that dies again and again still goes forward
                is_first = False
        if drain or flush:
            end = self.stream.end()
            while self.stream.upcoming() is not None or not self.stream.has_reached(end):
                self._advance()
        if flush:
            self.stream.flush()
            while self.step():
                self.run_requested()

    def _deliver_last(self) -> None:
        with suppress(Stopped):  # that its dead letters could not be written is in the log
            self._results.deliver()

    def _advance(self) -> None:
        """Train on the next batch, or read once if none is ready; then do what the schedules requested."""
        if not self.step():
            self._results.deliver()
            self.stream.poll(_POLL_S)
            self.times.lap("read")
            for observer in self._observers:
                observer.after_read()
        self.run_requested()
        self.times.lap("duties")

    def step(self) -> bool:
        """Score the next batch with the weights as they are, then take one step on it; False if none is ready."""
        examples = self.stream.next_batch()
        if examples is None:
            return False
        to_train_on, closings, result = examples.to_train_on(), examples.closings(), None
        if len(to_train_on):
            sifted = to_train_on
            if self.gated is not None and (sifted := self.gated.gate.sift(to_train_on)) is not to_train_on:
                self._sender.forget()
            batch = self._sender.take(examples, sifted)
            self.times.lap("prepare")
            for observer in self._observers:
                observer.before_step(to_train_on)
            self.times.lap("evaluate")
            result = self.learner.step(batch)
            self.times.lap("step")
            self.trained += to_train_on.num_impressions
            newest_ms = int(to_train_on.event_time_ms.max())
            self._event_time_ms = newest_ms if self._event_time_ms is None else max(self._event_time_ms, newest_ms)
        if len(closings):
            self.learner.observe_closed(closings)
        sifts = self.gated is not None and self.gated.gate.sifts  # what a batch weighs is then found before its step
        self._sender.send_ahead(None if sifts else self.stream.upcoming())
        self.times.lap("prepare")
        self._results.keep(to_train_on, result, closings)
        self.times.lap("results")
        return True

    def run_requested(self) -> None:
        """Do what the schedules requested since the last step.

        Between two failed steps no checkpoint is written, nor while the first cuts of a row are refused: the last good
        one must not be rotated away. A trainer that is killed then begins again before the refused stretch.

        Raises:
            LeaseLost: Another trainer publishes in this namespace.
        """
        if self.publisher is not None:
            self.publisher.check()
        if self._flags.take(SNAPSHOT):
            self.cut()
        if self._flags.take(CHECKPOINT):
            self._results.deliver()  # did the last step fail?
            if self.failed.in_a_row or (self.gated is not None and self.gated.postpones_checkpoints):
                self._flags.request(CHECKPOINT)  # later
                return
            if self.writer is not None and self.writer.is_busy:
                self._flags.request(CHECKPOINT)  # later
            elif self.writer is not None:
                self.writer.start(*self._view())

    def save(self) -> None:
        """Offer the final cut and write the final checkpoint; errors as :meth:`checkpoint`."""
        try:
            self.cut()
        except SmesError as error:
            _logger.error("the last snapshot, of step %d, was not cut: %s", self.learner.step_number, error)
        self.checkpoint()

    def finish(self, on_saved: Callable[[], object] | None = None) -> None:
        """Take the final cut and checkpoint; when this returns, both are published and on disk.

        Args:
            on_saved: See :meth:`run`.

        Raises:
            CheckpointError: The disk refused the checkpoint.
            FeatureStoreUnavailable: The cut could not be published.
        """
        try:
            self.save()
            if on_saved is not None:
                on_saved()
        finally:  # a full disk must not keep serving from what was learned
            published = self._close_publisher()
        if not published:
            kept = "the checkpoint holds these weights" if self._checkpoints else "there is no checkpoint of it"
            raise FeatureStoreUnavailable(
                f"snapshot of step {self.learner.step_number}: not published, because the store did not take it; {kept}"
            )

    def _close_publisher(self) -> bool:
        """Close the publisher, if any; whether everything was published."""
        published = self.offers.close()
        if not published:
            _logger.error("the last snapshot, of step %d, was not published", self.learner.step_number)
        return published

    def cut(self) -> None:
        """Offer the present weights to serving; see :meth:`trainer.cut_offers.CutOffers.offer`."""
        self.offers.offer()

    def take_cut(self, *, full: bool) -> Cut:
        """The present weights: all of them, or what changed since the last cut."""
        return self.offers.take(full=full)

    def checkpoint(self) -> None:
        """Write the whole present state to disk; when this returns, it is there.

        Raises:
            CheckpointError: The disk refused it.
        """
        if self.writer is not None:
            self._results.deliver()
            self.writer.write(*self._view())

    def view(self) -> CheckpointView:
        """The whole present state, for a checkpoint in another folder."""
        self._results.deliver()
        return self._view()[0]

    def _view(self) -> tuple[CheckpointView, Callable[[], None]]:
        return self._state.view(
            self.lineage,
            Progress(self.trained, self.not_finite, self._event_time_ms, self.schemas, self._joint_steps),
        )

    def _forget(self, examples: ExampleBlock) -> None:
        """Count a batch whose step failed."""
        self.trained -= examples.num_impressions
        self.not_finite += examples.num_impressions

    def routing_now(self) -> RoutingSummary:
        """See :meth:`trainer.routing_figures.RoutingObserver.summary_now`."""
        return self._routing.summary_now()

    def settle(self) -> None:
        """Give the last step's result to the observers, so that metrics cover every trained example."""
        self._results.deliver()
        self._routing.close_full_segment()
