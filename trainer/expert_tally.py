"""Running counts of what the routing executed, and the observer that keeps them and the routing's history.

Letters: B instances of a batch, T tasks, E experts.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smes.arrays import Arrays, prefixed, under
from smes.events import ExampleBlock
from smes.model.learner import Learner
from smes.rankers.ranker import ExpertLimits
from trainer.observers import Observer, StepFigures
from trainer.report import RoutingSummary
from trainer.routing_figures import routing_summary, skew
from trainer.routing_history import RoutingHistory, RoutingHistoryConfig, Segment

_HISTORY = "history."


class ExpertTally:
    """Experts executed and loads of all steps so far; empty for a ranker without experts.

    Attributes:
        history: The routing over time.

    Args:
        limits: Number of experts, and which can be chosen; None for a ranker without experts.
        history: How finely the history is kept; None for the default.
    """

    def __init__(self, limits: ExpertLimits | None, history: RoutingHistoryConfig | None = None) -> None:
        self.history = RoutingHistory(history)
        self._limits = limits
        self._summarised: tuple[Segment | None, RoutingSummary] = (None, RoutingSummary())
        self._counts = np.zeros(3, np.int64)  # instances, experts executed for them, most for one
        self._load_TE = np.zeros((0, 0), np.int64)

    def add(self, examples: ExampleBlock, active_B: NDArray[Any], load_TE: NDArray[Any]) -> None:
        """Add a batch: experts executed for each instance, and instances that each task sent to each expert."""
        self.history.add(examples, load_TE)
        instances, executed, most = self._counts
        self._counts[:] = instances + len(active_B), executed + active_B.sum(), max(most, active_B.max(initial=0))
        self._load_TE = load_TE.astype(np.int64) if self._load_TE.size == 0 else self._load_TE + load_TE

    @property
    def instances(self) -> int:
        """Instances counted."""
        return int(self._counts[0])

    @property
    def mean(self) -> float | None:
        """Experts executed per instance; None before the first instance."""
        return float(self._counts[1] / self._counts[0]) if self.instances else None

    @property
    def max(self) -> int | None:
        """Most experts executed for one instance; None before the first instance."""
        return int(self._counts[2]) if self.instances else None

    @property
    def load_share(self) -> list[float]:
        """Share of all (task, instance, expert) uses that each of the E experts carries; empty before the first."""
        load_E = self._load_TE.sum(axis=0)
        return [float(share) for share in load_E / load_E.sum()] if load_E.size else []

    @property
    def load_skew(self) -> float | None:
        """Largest load over mean load of the experts that can be chosen; 1 is even. None before the first instance."""
        load_E = self._load_TE.sum(axis=0)
        return skew(load_E[self._limits.num_fixed :]) if self._limits else None

    def summary(self) -> dict[str, Any]:
        """Plain JSON values for a snapshot's manifest."""
        return {
            "active_mean": self.mean,
            "active_max": self.max,
            "load_skew": self.load_skew,
            "load_share": [round(share, 5) for share in self.load_share],
            "routing": asdict(self.routing()),
        }

    def routing(self) -> RoutingSummary:
        """:func:`trainer.routing_figures.routing_summary`, computed once a segment: every cut asks for it."""
        newest = self.history.closed[-1] if self.history.closed else None
        if newest is None or newest is not self._summarised[0]:
            self._summarised = newest, routing_summary(self.history, self._limits)
        return self._summarised[1]

    def state(self) -> Arrays:
        """Arrays from which :meth:`load_state` continues."""
        return {
            "counts": self._counts.copy(),
            "load": self._load_TE,
            **prefixed(_HISTORY, self.history.state()),
        }

    def load_state(self, state: Arrays) -> None:
        """The inverse of :meth:`state`."""
        self._counts, self._load_TE = state["counts"].copy(), state["load"].copy()
        self.history.load_state(under(_HISTORY, state))


class RoutingObserver(Observer):
    """Adds every step to a tally, and probes the routing where a segment of its history ends.

    Args:
        learner: Its present weights choose experts for the probe.
        tally: Where the counts go.
        settle: Delivers the result of the last step, which the end of a segment must not miss.
    """

    def __init__(self, learner: Learner, tally: ExpertTally, settle: Callable[[], None]) -> None:
        self._learner, self._tally, self._settle = learner, tally, settle
        self._pending = 0  # steps taken whose results have not come yet

    def before_step(self, examples: ExampleBlock) -> None:
        """End the open segment if it is full: the step to come belongs to the next one."""
        self.close_full_segment()
        self._pending += 1

    def after_step(self, examples: ExampleBlock, figures: StepFigures) -> None:
        """Add the step to the tally."""
        self._pending -= 1
        if figures.active_experts is not None and figures.expert_load is not None:
            self._tally.add(examples, figures.active_experts, figures.expert_load)

    def close_full_segment(self) -> None:
        """End the open segment if it has all its steps, with what the present weights choose for the probe."""
        history = self._tally.history
        if not history.is_full(pending=self._pending > 0):
            return
        self._settle()
        choices_PTK = self._learner.choices(*history.probe)
        assert choices_PTK is not None, "only a ranker that routes has a history of its routing"
        history.close(choices_PTK.cpu().numpy())
