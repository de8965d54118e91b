"""Cuts of the present weights, offered for serving: which ones, when, and what the publish gate says of them."""

from collections.abc import Callable
from dataclasses import asdict, replace

from smes.model.deltas import RowDelta
from smes_io.clock import wall_clock_ms
from trainer.cuts import Cut
from trainer.feature_figures import SampledFeatures
from trainer.freshness import FeedbackArrivals
from trainer.gated_cuts import GatedCuts
from trainer.publisher import Publisher
from trainer.training_state import TrainingState


class CutOffers:
    """Takes cuts between two steps, and offers them to a publisher. Use it on the training thread.

    Attributes:
        publisher: Publishes cuts for serving; None until :meth:`open`.
        arrivals: Observes when the feedback came that was trained on.
        cut_ms: When the newest cut was taken, Unix milliseconds; None before the first one of this process.

    Args:
        parts: Of the trainer.
        features: What serving's features are compared with.
        gated: Judges the cuts; None: every cut is published.
        event_time_ms: Event time of the newest example trained on; None before the first.
        deliver: Gives the last step's result to the observers.
        forget_sent: Called when the weights are not those any more that the next batch was prepared for.
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
    ) -> None:
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

    def offer(self) -> None:
        """Offer the present weights to serving, unless the last cut has the same ones.

        Weights without a step are offered only where nothing is in service yet.
        """
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
            dense=learner.dense_serving_state() if view is None else view.dense,
            deltas=deltas,
            view=view,
            positions=parts.stream.positions_by_topic(),
            event_time_ms=self._event_time_ms(),
            metrics={
                "tasks": {name: asdict(metrics) for name, metrics in parts.evaluation.progressive().items()},
                "experts": parts.experts.summary(),
                **({"gate": self._gated.gate.summary()} if self._gated else {}),
                **({"features": features} if (features := self._features.summary()) else {}),
            },
            cut_ms=self.cut_ms,
            feedback=self.arrivals.take(),
        )

    def close(self) -> bool:
        """Close the publisher, if any; whether everything was published."""
        refused = self._gated is not None and self._gated.gate.refuses
        take_full = None if refused else lambda: self.take(full=True)
        return self.publisher is None or self.publisher.close(take_full=take_full)
