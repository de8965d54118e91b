"""What routing did so far: experts executed per instance, and how the load lies on the experts.

Letters: B instances of a batch, T tasks, E experts.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from smes.events import ExampleBlock
from smes.ranker import ExpertLimits
from trainer.routing_history import RoutingHistory, Stretch
from trainer.routing_lens import routing_summary, skew


class ExpertTally:
    """Running counts; empty for a ranker without experts.

    Args:
        limits: Which experts can be chosen from where; None for a ranker without experts.
    """

    def __init__(self, limits: ExpertLimits | None) -> None:
        self.history = RoutingHistory()
        self._limits = limits
        self._summarised: tuple[Stretch | None, dict[str, Any]] = (None, {})
        self._counts = np.zeros(3, np.int64)  # instances, experts executed for them, most for one
        self._load_TE = np.zeros((0, 0), np.int64)

    def add(self, examples: ExampleBlock, active_B: NDArray[Any], load_TE: NDArray[Any]) -> None:
        """Take one batch: experts executed per instance, and instances that each task sent to each expert."""
        self.history.add(examples, load_TE)
        instances, executed, most = self._counts
        self._counts[:] = instances + len(active_B), executed + active_B.sum(), max(most, active_B.max(initial=0))
        self._load_TE = load_TE.astype(np.int64) if self._load_TE.size == 0 else self._load_TE + load_TE

    @property
    def instances(self) -> int:
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
            "routing": self.routing(),
        }

    def routing(self) -> dict[str, Any]:
        """:func:`trainer.routing_lens.routing_summary`; worked out once a stretch, for every cut asks for it."""
        newest = self.history.closed[-1] if self.history.closed else None
        if newest is None or newest is not self._summarised[0]:
            self._summarised = newest, routing_summary(self.history, self._limits)
        return dict(self._summarised[1])

    def state(self) -> dict[str, NDArray[Any]]:
        """Arrays from which :meth:`load_state` goes on."""
        history = {f"history.{name}": array for name, array in self.history.state().items()}
        return {"counts": self._counts.copy(), "load": self._load_TE, **history}

    def load_state(self, state: dict[str, NDArray[Any]]) -> None:
        """The inverse of :meth:`state`."""
        self._counts, self._load_TE = state["counts"].copy(), state["load"].copy()
        self.history = RoutingHistory.of_state(
            {name.removeprefix("history."): array for name, array in state.items() if name.startswith("history.")}
        )
