"""Cuts of the present weights, offered for serving: which ones, when, and what the publish gate says of them.

Of several ranks, rank 0 decides, and all take their cuts at the same step. What its publisher and the other ranks'
uploaders tell each other meanwhile, the training threads carry: :meth:`CutOffers.message` and :meth:`CutOffers.hear`.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import msgspec

from feature_store.feedback_times import FeedbackTimes
from smes.errors import RankLost, SmesError
from smes.model.deltas import RowDelta
from smes.world import ALONE, World
from smes_io.clock import wall_clock_ms
from trainer.cuts import Cut
from trainer.feature_figures import SampledFeatures
from trainer.freshness import FeedbackArrivals
from trainer.gated_cuts import GatedCuts
from trainer.part_messages import CLOSING, DECISION, SHARE, Closing, Decision, Share
from trainer.part_uploader import PartUploader
from trainer.publisher import Publisher
from trainer.training_state import TrainingState

_logger = logging.getLogger(__name__)
_TURN_S = 0.02


class CutOffers:
    """Takes cuts between two steps, and offers them to a publisher. Use it on the training thread.

    All ranks call :meth:`offer` and :meth:`close` after the same step.

    Attributes:
        publisher: Publishes cuts for serving; None until :meth:`open`, and on other ranks than 0.
        arrivals: Observes when the feedback came that was trained on.
        cut_ms: When the newest cut was taken, Unix milliseconds; None before the first one of this process.

    Args:
        parts: Of the trainer.
        features: What serving's features are compared with.
        gated: Judges the cuts; None: every cut is published.
        event_time_ms: Event time of the newest example trained on; None before the first.
        deliver: Gives the last step's result to the observers.
        forget_sent: Called when the weights are not those any more that the next batch was prepared for.
        world: The ranks that train together.
    """

    def __init__(
        self,
        parts: TrainingState,
        features: SampledFeatures,
        gated: GatedCuts | None,
        *,
        event_time_ms: Callable[[], int | None],
        deliver: Callable[[], None],
        forget_sent: Callable[[], None],
        world: World = ALONE,
    ) -> None:
        self._world = world
        self._uploader: PartUploader | None = None
        self._parts, self._features, self._gated = parts, features, gated
        self._event_time_ms, self._deliver, self._forget_sent = event_time_ms, deliver, forget_sent
        self.publisher: Publisher | None = None
        self.arrivals = FeedbackArrivals(parts.stream.taken_times)
        self.cut_ms: int | None = None
        self._cut_step = -1
        self._first_step = 0

    def open(self, publisher: Publisher, first_step: int) -> None:
        """Offer cuts from now on, but none of before a step."""
        self.publisher, self._first_step = publisher, first_step
        self._features.start()

    def open_part(self, uploader: PartUploader) -> None:
        """Upload this rank's parts of rank 0's cuts from now on. On other ranks than 0, in place of :meth:`open`."""
        self._uploader = uploader
        self._features.start()

    def message(self) -> bytes:
        """What is to be carried to the other ranks: of rank 0 to all, of each other rank to rank 0. Empty: nothing."""
        if self.publisher is not None and self.publisher.others is not None:
            return self.publisher.others.orders()
        return self._uploader.report() if self._uploader is not None else b""

    def hear(self, messages: Sequence[bytes]) -> None:
        """Take the messages: on rank 0 those of all ranks, in their order; on another rank that of rank 0 alone."""
        if self.publisher is not None and self.publisher.others is not None:
            self.publisher.others.hear(messages)
        elif self._uploader is not None:
            self._uploader.hear(messages[0])

    def exchange(self) -> None:
        """Carry the messages by two collectives of their own. All ranks call it, if they do not send them otherwise."""
        if self._world.size > 1:
            message = self.message()
            orders, reports = self._world.broadcast(message), self._world.collect(message)
            self.hear(reports if self._world.rank == 0 else [orders])

    def offer(self) -> None:
        """Offer the present weights to serving, unless the last cut has the same ones.

        Weights without a step are offered only where nothing is in service yet.
        """
        if self._world.size > 1:
            self._offer_jointly()
            return
        step, publisher = self._parts.learner.step_number, self.publisher
        if publisher is None or step < self._first_step:
            return
        full = publisher.wants_full
        if step == self._cut_step and not (full and publisher.has_owed):
            return
        if self._gated is not None:
            self._offer_gated(self._gated, publisher, full=full)
            return
        self._cut_step = step
        publisher.offer(self.take(full=full, base=publisher.wants_base))

    def _offer_gated(self, gated: GatedCuts, publisher: Publisher, *, full: bool) -> None:
        """Offer the present weights if the gate lets them pass. If not, they are kept aside, or go back."""
        self._deliver()
        step = self._parts.learner.step_number
        outcome = gated.judge(step, publisher)
        if outcome == "skip":
            return
        if outcome == "go_back":
            gated.go_back(step)
            self._parts.evaluation.reopen()
            self._forget_sent()
        cut = self.take(full=full or outcome == "go_back", base=outcome != "hold" and publisher.wants_base)
        if outcome == "hold" or (outcome == "publish" and gated.refuses_weights(cut)):
            publisher.offer(replace(cut, held=gated.gate.reason))
            return
        self._cut_step = step
        publisher.offer(cut)
        if outcome == "publish":
            gated.published(step)

    def take(self, *, full: bool, base: bool = False) -> Cut:
        """The present weights: all of them, or what changed since the last cut, and for a base all of them as well."""
        self._deliver()
        parts, learner = self._parts, self._parts.learner
        deltas: tuple[RowDelta, ...] = ()
        if full:
            learner.skip_delta()
        else:
            deltas = (learner.take_delta(),)
        view = learner.full_view() if full or base else None
        self.cut_ms = wall_clock_ms()
        return Cut(
            step=learner.step_number,
            dense=view.dense if view is not None else learner.dense_serving_state() if self._world.rank == 0 else {},
            deltas=deltas,
            view=view,
            positions=parts.stream.positions_by_topic(),
            event_time_ms=self._event_time_ms(),
            metrics=self._metrics() if self._world.rank == 0 else {},
            cut_ms=self.cut_ms,
            feedback=self.arrivals.take(),
        )

    def _metrics(self) -> dict[str, Any]:
        return {
            "tasks": {name: asdict(metrics) for name, metrics in self._parts.evaluation.progressive().items()},
            "experts": self._parts.experts.summary(),
            **({"gate": self._gated.gate.summary()} if self._gated else {}),
            **({"features": features} if (features := self._features.summary()) else {}),
        }

    def _offer_jointly(self) -> None:
        """Rank 0 says whether a cut is taken, and which one; then all take it."""
        step, publisher = self._parts.learner.step_number, self.publisher
        said = DECISION.decode(self._world.broadcast(msgspec.json.encode(self._decision(step, publisher))))
        if said is None:
            return
        self._cut_step = step
        cut = self.take(full=said.full, base=said.base)
        share = Share(cut.positions, cut.event_time_ms, cut.feedback.rows())
        shares = [SHARE.decode(text) for text in self._world.collect(msgspec.json.encode(share))]
        if self._uploader is not None:
            self._uploader.offer(said, cut)
        elif publisher is not None:
            try:
                publisher.offer(_of_all(cut, shares))
            except SmesError as error:  # all ranks hear it together, when Publisher.check() is asked the next time
                _logger.error("the cut of step %d was not taken: %s", step, error)
        else:
            cut.without_view()

    def _decision(self, step: int, publisher: Publisher | None) -> Decision | None:
        """What rank 0 says of a cut at this step; None: none is taken."""
        if publisher is None or step < self._first_step:
            return None
        full = publisher.wants_full
        if step == self._cut_step and not (full and publisher.has_owed):
            return None
        return Decision(full, publisher.wants_base, publisher.num_deltas, publisher.lineage)

    def _close_jointly(self) -> bool:
        """Go on carrying messages until rank 0's publisher is closed."""
        publisher, closing = self.publisher, None
        answers: list[bool] = []
        if publisher is not None:
            closing = threading.Thread(target=lambda: answers.append(publisher.close()), name="publisher-close")
            closing.start()
        try:
            while True:
                is_over = closing is None or not closing.is_alive()
                offers = publisher is not None and not is_over and publisher.wants_full and publisher.has_owed
                state = Closing(is_over, publisher is None or any(answers), offers)
                said = CLOSING.decode(self._world.broadcast(msgspec.json.encode(state)))
                self.exchange()
                if said.is_over:
                    return said.published
                if said.offers:
                    self._offer_jointly()
                if closing is not None:
                    closing.join(_TURN_S)
        except RankLost as error:
            _logger.error("the last snapshot was not published: %s", error)
            return False
        finally:
            if publisher is not None and publisher.others is not None:
                publisher.others.gone("the training ends")
            if self._uploader is not None:
                self._uploader.close()

    def close(self) -> bool:
        """Close the publisher, if any; whether everything was published."""
        if self._world.size > 1:
            return self._close_jointly()
        refused = self._gated is not None and self._gated.gate.refuses
        take_full = None if refused else lambda: self.take(full=True)
        return self.publisher is None or self.publisher.close(take_full=take_full)


def _of_all(cut: Cut, shares: Sequence[Share]) -> Cut:
    """Rank 0's cut, with what the manifest says of all ranks."""
    positions: dict[str, dict[str, int]] = {}
    for share in shares:
        for topic, partitions in share.positions.items():
            positions.setdefault(topic, {}).update(partitions)
    times_ms = [share.event_time_ms for share in shares if share.event_time_ms is not None]
    feedback = FeedbackTimes.concat(FeedbackTimes.of_rows(share.feedback) for share in shares)
    return replace(cut, positions=positions, event_time_ms=max(times_ms, default=None), feedback=feedback.merged())
