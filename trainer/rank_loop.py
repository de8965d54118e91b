"""The training loop over several ranks: each reads its partitions, all take every step, cut and checkpoint together.

The loop goes by turns (:mod:`trainer.joint_turn`). In each, the ranks tell each other what they have and what is asked
of them, and all decide the same. So a stop, an error, a cut and a checkpoint come at the same step everywhere, whoever
was asked first.

When does a step take place? When every rank has a batch, or cannot get one. A rank cannot get one

- while it trains live: when its partitions have had nothing new for ``idle_after_s``; where ``batch.max_wait_s`` lets
  the clock end batches in any case, as soon as it has read all there is;
- while it drains: when it has read its partitions up to where they ended when the stop was asked for.

Then it takes part with an empty batch. Who took part in a step may so depend on the clock. It is written down before
the step is taken, and a restart repeats it. The steps of a drain over a log that has ended depend on the log alone.

Rank 0 also counts: metrics and ledgers are of the examples of all ranks.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import IntEnum
from functools import partial
from typing import Any

import msgspec
import numpy as np
import torch

from feature_store.publication import Manifest
from smes.errors import RankFailed, SmesError, Stopped
from smes.events import CLOSING, ExampleBlock
from smes.model.learner import Learner
from smes.model.memory_use import MemoryUse
from smes.model.rows_config import RowCounts
from smes.schema import MISSING
from smes.world import World
from stream.batch_journal import BatchJournal
from stream.example_stream import ExampleStream
from stream.log.event_log import Positions
from trainer.checkpoint_file import Checkpoint, CheckpointView
from trainer.evaluation import ProgressiveEvaluation
from trainer.joint_turn import JointStep, Repeats, Said, Turn, mask_of, next_step
from trainer.lineages import first_step_to_publish, lineage_to_publish, new_lineage
from trainer.loop import CHECKPOINT, SNAPSHOT, Trainer
from trainer.observers import Observer, StepFigures
from trainer.part_uploader import PartUploader
from trainer.publisher import Publisher
from trainer.rank_figures import RankFigures
from trainer.rank_results import RankResults
from trainer.rank_streams import StreamOfAll
from trainer.report import RoutingSummary
from trainer.routing_figures import ExpertTally
from trainer.routing_history import RoutingHistoryConfig
from trainer.schedule import Flags
from trainer.shared_checkpoints import SharedCheckpoints, SharedCheckpointWriter
from trainer.stretches import Stretches

_logger = logging.getLogger(__name__)
_POLL_S, _SHORT_POLL_S = 0.2, 0.05  # the latter of a rank for which others wait
_FIGURES_S = 1.0


class _Phase(IntEnum):
    LIVE = 0
    DRAIN = 1
    FLUSH = 2
    OVER = 3


class RankTrainer(Trainer):
    """One rank's :class:`trainer.loop.Trainer`. All ranks call its methods together, in the same order.

    Attributes:
        trained, not_finite: Of all ranks together.
        steps: Joint steps so far, those before a restart and those that were not finite among them.

    Args:
        world: The ranks, more than one.
        learner, stream, evaluation, flags: As of :class:`trainer.loop.Trainer`; the flags of rank 0 count for all. The
            stream has this rank's share of the log, the evaluation no frozen weights.
        open_part: Opens what uploads this rank's part of each snapshot; not called on rank 0.
        checkpoints: Where all ranks' checkpoints go; None keeps none.
        journal: Where rank 0 writes down which ranks took part in a step; None on others, and without checkpoints.
        live_by_clock: Whether the clock may end batches (``batch.max_wait_s``).
        stretches: As of :class:`trainer.loop.Trainer`.
        others: Further arguments of :class:`trainer.loop.Trainer`.
    """

    def __init__(
        self,
        world: World,
        learner: Learner,
        stream: ExampleStream,
        evaluation: ProgressiveEvaluation,
        flags: Flags,
        *,
        open_part: Callable[[], PartUploader],
        checkpoints: SharedCheckpoints | None = None,
        journal: BatchJournal | None = None,
        live_by_clock: bool = False,
        stretches: Stretches | None = None,
        **others: Any,
    ) -> None:
        self._world, self._own, self._shared, self._open_part = world, stream, checkpoints, open_part
        self._journal, self._repeats, self._live_by_clock = journal, Repeats({}), live_by_clock
        self._told_all: list[Observer] = []  # on rank 0, of the examples of all ranks
        lineage = world.broadcast(new_lineage().encode()).decode()
        super().__init__(
            learner,
            stream,
            evaluation,
            flags,
            lineage=lineage,
            prefetch=False,
            stretches=stretches,
            world=world,
            **others,
        )
        self._told_all += [_Tally(self.experts), evaluation, *([stretches] if stretches else []), self.arms]
        self._observers[:] = [self.failed]
        self.writer = SharedCheckpointWriter(checkpoints, world) if checkpoints else None
        self.steps = 0
        self._empty = ExampleBlock.empty(learner.schema)
        self._phase, self._end = _Phase.LIVE, Positions()
        self._is_stopping = self._is_polling = self._is_first = self._reads_on = False
        self._should_stop: Callable[[], bool] = lambda: False
        self._error: SmesError | None = None
        self._common_end: SmesError | None = None  # met in a turn that was taken while this rank waited for its log
        self._figures: RankFigures | None = None
        self._figures_due_s = 0.0
        self.stream = StreamOfAll(stream, lambda: self._figures)
        self.times.seconds["turn"] = 0.0

    def _new_results(self) -> RankResults:
        self._joint_results = RankResults(self._world, self._observers, self._told_all, self._count_failed)
        return self._joint_results

    def _new_tally(self, routing: RoutingHistoryConfig | None) -> ExpertTally:
        return ExpertTally(self.learner.expert_limits, keeps_history=False)

    @property
    def row_counts(self) -> RowCounts:
        """Of all ranks together, as of the last exchange of figures."""
        return self.learner.row_counts if self._figures is None else self._figures.rows

    @property
    def num_rows(self) -> int:
        """Likewise."""
        return self.learner.num_rows if self._figures is None else self._figures.num_rows

    @property
    def memory(self) -> MemoryUse:
        """Likewise."""
        return self.learner.memory if self._figures is None else self._figures.memory

    def restore(self, carried_over: Callable[[Checkpoint], Checkpoint] | None = None) -> int | None:
        """As :meth:`trainer.loop.Trainer.restore`, from a checkpoint of any number of ranks."""
        if self._shared is None:
            return None
        schema, model = self.learner.schema, self.learner.config.to_dict()
        checkpoint = self._shared.newest(schema=schema, model=model, carried_over=carried_over)
        if checkpoint is None:
            return None
        self.prime(checkpoint)
        self.lineage = checkpoint.lineage
        if not checkpoint.on_disk:
            self.checkpoint()
        return checkpoint.step

    def prime(self, checkpoint: Checkpoint) -> None:
        """As :meth:`trainer.loop.Trainer.prime`; steps are repeated as they were taken if as many ranks took them."""
        super().prime(checkpoint)
        steps = checkpoint.arrays.get("trainer.steps") if checkpoint.on_disk else None
        self.steps = 0 if steps is None else int(steps[0])
        told = self._world.broadcast(msgspec.json.encode(self._resumed(follows=steps is not None)))
        self._repeats = Repeats(msgspec.json.decode(told, type=dict[int, int]))

    def _resumed(self, *, follows: bool) -> dict[int, int]:
        """The steps that were taken after a checkpoint, if it is of as many ranks."""
        if self._journal is None:
            return {}
        if not follows:
            self._journal.clear()
            return {}
        return {number: int(note, 16) for number, note in self._journal.resume_noted(self.steps)}

    def note_skipped(self, skipped: bool) -> None:
        """Note whether this rank's stream goes on elsewhere than its checkpoint says: then no rank repeats steps."""
        told = torch.tensor([int(skipped)])
        self._world.sum([told])
        if int(told):
            self._repeats.clear()
            if self._journal is not None:
                self._journal.clear()

    def publish_to(
        self,
        open_publisher: Callable[[str], Publisher],
        served: Manifest | None,
        *,
        listed: Sequence[Manifest] = (),
        unreadable: bool = False,
        steps_before_replacing: int = 1,
    ) -> None:
        """As :meth:`trainer.loop.Trainer.publish_to`: rank 0 publishes, the others upload their parts."""
        lineage = lineage_to_publish(self.lineage, self.learner.step_number, served, listed)
        self.lineage = self._world.broadcast(lineage.encode()).decode()
        if self._world.rank == 0:
            first_step = first_step_to_publish(
                self.lineage, served, unreadable=unreadable, steps_before_replacing=steps_before_replacing
            )
            self.offers.open(open_publisher(self.lineage), first_step)
        else:
            self.offers.open_part(self._open_part())
        self.observe(self.offers.arrivals)
        if self.learner.step_number:
            self.cut()

    def _train(self, should_stop: Callable[[], bool], *, drain: bool, flush: bool) -> None:
        self._should_stop, self._is_first, self._reads_on = should_stop, True, drain or flush
        while self._phase is not _Phase.OVER:
            turn = self._take_turn()
            self._do_requested(turn)
            if self._has_phase_ended(turn):
                self._begin_next_phase(drain=drain, flush=flush)
            elif (step := self._next_step(turn)) is not None:
                self._step_together(step)
            else:
                self._results.deliver()
                if self._own.upcoming() is None:
                    timeout_s = _SHORT_POLL_S if turn.any("has_batch") else _POLL_S
                    self._ask_log(partial(self._own.poll, timeout_s))
                for observer in (*self._observers, *self._told_all):
                    observer.after_read()

    def take_part(self) -> None:
        """Take part in a turn while this rank waits for its event log; elsewhere, do nothing.

        Raises:
            Stopped: All stop, and nothing more is to be read.
            SmesError: All ranks end in this turn.
        """
        if not self._is_polling:
            return
        try:
            turn = self._take_turn()
            self._do_requested(turn)
            if self._has_phase_ended(turn):
                if not self._reads_on:
                    self._phase = _Phase.OVER
                    raise Stopped("the event log was waited for when all ranks stopped")
                return  # this rank's turns say so, too, until it has come there
            if (step := self._next_step(turn)) is not None:  # it is repeated, and this rank had no part in it
                self._step_together(step)
            else:
                self._results.deliver()
        except SmesError as error:
            self._common_end = error
            raise

    def _take_turn(self) -> Turn:
        """Hear the other ranks.

        Raises:
            SmesError: This rank has met an error, and the others know.
            RankFailed: Another one has.
        """
        self._note_errors()
        message = self.offers.message()
        turn = Turn.take(self._world, self._said(has_mail=bool(message)))
        self.times.lap("turn")
        self._is_stopping = self._is_stopping or turn.any("stop")
        if turn.any("mail"):
            orders, reports = self._world.broadcast(message), self._world.collect(message)
            self.offers.hear(reports if self._world.rank == 0 else [orders])
        if isinstance(self.writer, SharedCheckpointWriter):
            self.writer.hear(turn.of("checkpoint_part").tolist())
        if turn.any("failed"):
            if self._error is not None:
                raise self._error
            raise RankFailed(f"rank {turn.first('failed')} met an error and stops the training; it says which")
        return turn

    def _note_errors(self) -> None:
        try:
            if self.publisher is not None:
                self.publisher.check()
        except SmesError as error:
            self._error = self._error or error
        if isinstance(self._joint_results.error, Stopped):
            _logger.warning("%s", self._joint_results.error)
            self._is_stopping, self._joint_results.error = True, None
        self._error = self._error or self._joint_results.error

    def _said(self, *, has_mail: bool) -> Said:
        batch, is_first_rank = (None if self._is_polling else self._own.upcoming()), self._world.rank == 0
        is_due = is_first_rank and time.monotonic() >= self._figures_due_s
        said = Said(
            phase=self._phase,
            cannot=self._cannot_get_one,
            is_over=self._is_over and batch is None,
            is_spent=self._own.is_spent,
            stop=self._is_stopping or self._should_stop(),
            failed=self._error is not None,
            snapshot=is_first_rank and self._flags.take(SNAPSHOT),
            checkpoint=is_first_rank and self._flags.take(CHECKPOINT),
            checkpoint_part=self.writer.report() if isinstance(self.writer, SharedCheckpointWriter) else 0,
            figures=is_due,
            mail=has_mail,
        )
        if batch is None:
            return said
        closings = int(np.count_nonzero(batch.kind == CLOSING))
        newest_ms = MISSING if closings == len(batch) else int(batch.event_time_ms[batch.kind != CLOSING].max())
        return replace(
            said,
            has_batch=True,
            to_train_on=len(batch) - closings,
            closings=closings,
            impressions=batch.num_impressions,
            newest_ms=newest_ms,
        )

    @property
    def _cannot_get_one(self) -> bool:
        if self._is_polling:
            return False
        if self._phase is _Phase.LIVE:
            return self._own.is_idle or (self._live_by_clock and self._own.is_caught_up)
        return self._is_over

    @property
    def _is_over(self) -> bool:
        if self._is_polling or self._phase is _Phase.LIVE:
            return False
        return self._phase is _Phase.FLUSH or self._own.has_reached(self._end)

    def _next_step(self, turn: Turn) -> JointStep | None:
        phase = turn.of("phase")
        if (phase != phase[0]).any():
            return None  # a rank that waited for its event log has not heard of the stop yet
        wanted = self._repeats.of(self.steps + 1, self._world.size)
        lacks = ~turn.of("has_batch").astype(np.bool_) & turn.of("is_spent").astype(np.bool_)
        if wanted is not None and (wanted & lacks).any():
            _logger.warning(
                "the log has ended before the batches that were trained on before the restart: from here on ranks may "
                "take part in other steps"
            )
            self._repeats.clear()
            if self._journal is not None:
                self._journal.clear()
            wanted = None
        return next_step(turn, wanted)

    def _step_together(self, step: JointStep) -> None:
        """Take one step on the batches of the ranks that take part."""
        self.steps += 1
        if self._journal is not None:
            self._journal.add(self.steps, f"{mask_of(step.takes_part):x}")
        examples = self._own.next_batch() if step.takes_part[self._world.rank] else self._empty
        assert examples is not None, "this rank has said that it has a batch"
        to_train_on, closings, result = examples.to_train_on(), examples.closings(), None
        if step.to_train_on:
            batch = self.learner.prepare(to_train_on)
            self.times.lap("prepare")
            for observer in self._observers:
                observer.before_step(to_train_on)
            self.times.lap("evaluate")
            result = self.learner.step(batch)
            self.times.lap("step")
            self.trained += step.impressions
            newest_ms = step.newest_ms
            self._event_time_ms = newest_ms if self._event_time_ms is None else max(self._event_time_ms, newest_ms)
        if step.closings:
            self.learner.observe_closed(closings)
        self._results.keep(to_train_on, result, closings)
        self._joint_results.impressions = step.impressions
        self.times.lap("results")
        if self._is_first and result is not None:
            self._flags.request(CHECKPOINT)  # a trainer that dies again and again still goes forward
            self._is_first = False

    def _ask_log(self, ask: Callable[[], object]) -> None:
        """Ask the event log for something. Meanwhile this rank takes part; an error of the log all hear in a turn."""
        self._is_polling = True
        try:
            ask()
        except Stopped as stopped:
            _logger.warning("%s", stopped)
            self._is_stopping = True
        except SmesError as error:
            if error is self._common_end:
                raise
            self._error = self._error or error
        finally:
            self._is_polling = False
        self.times.lap("read")

    def _note_end(self) -> None:
        self._end = self._own.end()

    def _do_requested(self, turn: Turn) -> None:
        """Do what rank 0's schedules requested."""
        if turn.any("figures"):
            self._exchange_figures()
        if turn.any("snapshot"):
            self.cut()
        if turn.any("checkpoint") and self.writer is not None:
            self._results.deliver()
            if self.failed.in_a_row or self.writer.is_busy:
                self._flags.request(CHECKPOINT)  # later
            else:
                self.writer.start(*self._view())
        self.times.lap("duties")

    def _has_phase_ended(self, turn: Turn) -> bool:
        return turn.any("stop") if self._phase is _Phase.LIVE else turn.all("is_over")

    def _begin_next_phase(self, *, drain: bool, flush: bool) -> None:
        if self._phase is _Phase.LIVE and (drain or flush):
            self._phase = _Phase.DRAIN
            self._ask_log(self._note_end)
        elif self._phase is _Phase.DRAIN and flush:
            self._phase = _Phase.FLUSH
            self._own.flush()
        else:
            self._phase = _Phase.OVER

    def _exchange_figures(self) -> None:
        self._figures = RankFigures.of(self._own, self.learner).of_all(self._world)
        self._figures_due_s = time.monotonic() + _FIGURES_S

    def save(self) -> None:
        """Offer the final cut and write the final checkpoint; then rank 0 knows the figures of all."""
        super().save()
        self._exchange_figures()

    def finish(self, on_saved: Callable[[], object] | None = None) -> None:
        """As :meth:`trainer.loop.Trainer.finish`; then an error that the other ranks have not heard of is raised."""
        super().finish(on_saved)
        error = self._joint_results.error
        if error is not None and self._error is None and not isinstance(error, Stopped):
            raise error

    def routing_now(self) -> RoutingSummary:
        """What is known without probing the routing."""
        return self.experts.routing()

    def settle(self) -> None:
        """Give the last step's result to the observers, so that metrics cover every trained example."""
        self._results.deliver()

    def _view(self) -> tuple[CheckpointView, Callable[[], None]]:
        view, on_saved = super()._view()
        steps, journal = self.steps, self._journal

        def saved() -> None:
            on_saved()
            if journal is not None:
                journal.saved(steps)

        return view, saved

    @property
    def _joint_steps(self) -> int | None:
        return self.steps

    def _forget(self, examples: ExampleBlock) -> None:
        """Nothing: the examples of all ranks are counted together."""

    def _count_failed(self, impressions: int) -> None:
        self.trained -= impressions
        self.not_finite += impressions


class _Tally(Observer):
    """Adds every step to a tally."""

    def __init__(self, tally: ExpertTally) -> None:
        self._tally = tally

    def after_step(self, examples: ExampleBlock, figures: StepFigures) -> None:
        """Add the step."""
        if figures.active_experts is not None and figures.expert_load is not None:
            self._tally.add(examples, figures.active_experts, figures.expert_load)
