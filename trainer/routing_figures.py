"""What the routing's history shows: load, dead experts, skew, overlap between tasks, drift between versions.

Letters: T tasks, E experts, K experts that a task chooses, P instances of the probe.
"""

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smes.events import ExampleBlock
from smes.rankers.ranker import ExpertLimits
from trainer.routing_history import RoutingHistory, Stretch

F64 = NDArray[np.float64]


def skew(load_N: NDArray[Any]) -> float | None:
    """Largest load over mean load: 1 is even, N is all on one. None where there is none."""
    return float(load_N.max() / load_N.mean()) if load_N.any() else None


def dead_experts(load_TE: NDArray[Any]) -> list[int]:
    """Experts that no task used."""
    return [int(e) for e in np.flatnonzero(load_TE.sum(axis=0) == 0)]


def jaccard(one_NK: NDArray[Any], other_NK: NDArray[Any]) -> F64:
    """|A ∩ B| / |A ∪ B| of sets of K different experts each. [..., K] and [..., K], broadcast → [...]."""
    K = one_NK.shape[-1]
    common = (one_NK[..., :, None] == other_NK[..., None, :]).sum(axis=(-2, -1))
    shares: F64 = common / (2 * K - common)
    return shares


def overlap(choices_PTK: NDArray[Any]) -> F64:
    """Jaccard of two tasks' experts for the same instance, mean over the instances. [T, T], 1 on the diagonal."""
    T = choices_PTK.shape[1]
    return np.stack([jaccard(choices_PTK[:, t : t + 1], choices_PTK).mean(axis=0) for t in range(T)])


def drift(before_PTK: NDArray[Any], after_PTK: NDArray[Any]) -> F64:
    """1 − Jaccard of a task's experts for the same instance before and after, mean over the instances. [T]."""
    shares_T: F64 = 1.0 - jaccard(before_PTK, after_PTK).mean(axis=0)
    return shares_T


def routing_summary(history: RoutingHistory, limits: ExpertLimits | None) -> dict[str, Any]:
    """The newest stretch that has ended (if none has, the open one), as plain JSON values.

    ``stretch_steps``, its length; ``dead``, experts that no task used in it; ``load_skew``, over the experts that can
    be chosen; ``drift`` since the stretch before, mean over the tasks; ``overlap``, mean over the pairs of tasks. None
    where there is nothing to say.
    """
    summary: dict[str, Any] = dict.fromkeys(("stretch_steps", "dead", "load_skew", "drift", "overlap"))
    stretches = history.closed or history.stretches
    if limits is None or not stretches:
        return summary
    last = stretches[-1]
    summary |= {
        "stretch_steps": last.steps,
        "dead": len(dead_experts(last.load_TE)),
        "load_skew": skew(last.load_TE.sum(axis=0)[limits.num_fixed :]),
    }
    if last.choices_PTK is not None:
        others = overlap(last.choices_PTK)[np.triu_indices(len(last.load_TE), k=1)]
        summary["overlap"] = float(others.mean()) if others.size else None
        before = stretches[-2].choices_PTK if len(stretches) > 1 else None
        summary["drift"] = float(drift(before, last.choices_PTK).mean()) if before is not None else None
    return summary


def routing_report(history: RoutingHistory, limits: ExpertLimits | None, tasks: list[str]) -> dict[str, Any]:
    """All of the routing over time, as plain JSON values; without stretches for a ranker without experts.

    Args:
        history: Of the routing.
        limits: Which experts can be chosen from where.
        tasks: Names of the T tasks.
    """
    stretches = history.stretches if limits is not None else ()
    report: dict[str, Any] = {
        "tasks": tasks,
        "num_experts": limits.num_experts if limits else None,
        "always_on": limits.num_fixed if limits else None,
        "pools": limits.num_pools if limits else None,
        "probe_instances": len(history.probe[0]) if stretches else 0,
        "stretches": [],
    }
    if limits is None:
        return report
    figures = [_of_stretch(stretch, limits) for stretch in stretches]
    for (before, last), values in zip(pairwise(stretches), figures[1:], strict=True):
        if before.choices_PTK is not None and last.choices_PTK is not None:
            values["drift"] = drift(before.choices_PTK, last.choices_PTK).round(5).tolist()
    return report | {"stretches": figures}


def _of_stretch(stretch: Stretch, limits: ExpertLimits) -> dict[str, Any]:
    chosen_TE = stretch.load_TE[:, limits.num_fixed :]
    chosen_PL = chosen_TE.sum(axis=0).reshape(limits.num_pools, -1)
    # A task's mean is over the experts of the pools that it uses: one, or, while groups are to be found, all.
    of_tasks = chosen_TE.reshape(len(chosen_TE), limits.num_pools, -1)
    pools_of_tasks = [np.flatnonzero(load_PL.sum(axis=1)) for load_PL in of_tasks]
    return {
        "steps": stretch.steps,
        "instances": stretch.instances,
        "load": stretch.load_TE.tolist(),
        "dead": dead_experts(stretch.load_TE),
        "load_skew": skew(chosen_PL),
        "load_skew_of_pools": [skew(load_L) for load_L in chosen_PL],
        "load_skew_of_tasks": [skew(load_PL[pools]) for load_PL, pools in zip(of_tasks, pools_of_tasks, strict=True)],
        "pools_of_tasks": [pools.tolist() for pools in pools_of_tasks],
        "overlap": None if stretch.choices_PTK is None else overlap(stretch.choices_PTK).round(5).tolist(),
        "drift": None,
    }


# TODO(merge) was trainer.expert_tally: What routing did so far: experts executed per instance, and


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
        """:func:`trainer.routing_figures.routing_summary`; worked out once a stretch, for every cut asks for it."""
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
