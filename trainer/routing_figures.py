"""Figures of the routing: running counts, and from its history load, dead experts, skew, overlap, drift.

:class:`RoutingObserver` keeps the counts and the history. Letters: B instances of a batch, T tasks, E experts, K
experts that a task chooses, P instances of the probe, L experts of a pool, N anything.
"""

from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smes.arrays import F64, Arrays, prefixed, under
from smes.events import ExampleBlock
from smes.model.learner import Learner
from smes.rankers.ranker import ExpertLimits
from trainer.observers import Observer, StepFigures
from trainer.report import RoutingSummary
from trainer.routing_history import RoutingHistory, RoutingHistoryConfig, Segment


def skew(load_N: NDArray[Any]) -> float | None:
    """Largest load over mean load: 1 is even, N means that one carries all. None without any load."""
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


def newest_drift(history: RoutingHistory) -> F64 | None:
    """The drift of each task from the last but one segment that has ended to the last one, [T]; None without."""
    if len(history.closed) < 2:
        return None
    before, last = history.closed[-2:]
    assert before.choices_PTK is not None, "it has ended"
    assert last.choices_PTK is not None, "it has ended"
    return drift(before.choices_PTK, last.choices_PTK)


def routing_summary(history: RoutingHistory, limits: ExpertLimits | None) -> RoutingSummary:
    """Figures of the newest segment that has ended; of the open one if none has."""
    return _summary(history, limits, newest_drift(history))


def _summary(history: RoutingHistory, limits: ExpertLimits | None, drift_T: F64 | None) -> RoutingSummary:
    segments = history.closed or history.segments
    if limits is None or not segments:
        return RoutingSummary()
    last = segments[-1]
    mean_overlap = mean_drift = None
    if last.choices_PTK is not None:
        others = overlap(last.choices_PTK)[np.triu_indices(len(last.load_TE), k=1)]
        mean_overlap = float(others.mean()) if others.size else None
        mean_drift = float(drift_T.mean()) if drift_T is not None else None
    return RoutingSummary(
        segment_steps=last.steps,
        dead=len(dead_experts(last.load_TE)),
        load_skew=skew(last.load_TE.sum(axis=0)[limits.num_fixed :]),
        drift=mean_drift,
        overlap=mean_overlap,
    )


def routing_report(history: RoutingHistory, limits: ExpertLimits | None, tasks: list[str]) -> dict[str, Any]:
    """All of the routing over time, as plain JSON values; without segments for a ranker without experts.

    Args:
        history: The routing's history.
        limits: Number of experts, and which can be chosen.
        tasks: Names of the T tasks.
    """
    segments = history.segments if limits is not None else ()
    report: dict[str, Any] = {
        "tasks": tasks,
        "num_experts": limits.num_experts if limits else None,
        "always_on": limits.num_fixed if limits else None,
        "pools": limits.num_pools if limits else None,
        "probe_instances": len(history.probe[0]) if segments else 0,
        "segments": [],
    }
    if limits is None:
        return report
    figures = [_segment_figures(segment, limits) for segment in segments]
    for (before, last), values in zip(pairwise(segments), figures[1:], strict=True):
        if before.choices_PTK is not None and last.choices_PTK is not None:
            values["drift"] = drift(before.choices_PTK, last.choices_PTK).round(5).tolist()
    return report | {"segments": figures}


def _segment_figures(segment: Segment, limits: ExpertLimits) -> dict[str, Any]:
    chosen_TE = segment.load_TE[:, limits.num_fixed :]
    chosen_PL = chosen_TE.sum(axis=0).reshape(limits.num_pools, -1)
    # A task's mean is over the experts of the pools that it uses: one pool, or all until its group is found.
    of_tasks = chosen_TE.reshape(len(chosen_TE), limits.num_pools, -1)
    pools_of_tasks = [np.flatnonzero(load_PL.sum(axis=1)) for load_PL in of_tasks]
    return {
        "steps": segment.steps,
        "instances": segment.instances,
        "load": segment.load_TE.tolist(),
        "dead": dead_experts(segment.load_TE),
        "load_skew": skew(chosen_PL),
        "load_skew_of_pools": [skew(load_L) for load_L in chosen_PL],
        "load_skew_of_tasks": [skew(load_PL[pools]) for load_PL, pools in zip(of_tasks, pools_of_tasks, strict=True)],
        "pools_of_tasks": [pools.tolist() for pools in pools_of_tasks],
        "overlap": None if segment.choices_PTK is None else overlap(segment.choices_PTK).round(5).tolist(),
        "drift": None,
    }


_HISTORY = "history."


class ExpertTally:
    """Experts executed and loads of all steps so far; empty for a ranker without experts.

    Attributes:
        history: The routing over time.

    Args:
        limits: Number of experts, and which can be chosen; None for a ranker without experts.
        history: How finely the history is kept; None for the default.
        keeps_history: Whether it is kept at all.
    """

    def __init__(
        self, limits: ExpertLimits | None, history: RoutingHistoryConfig | None = None, *, keeps_history: bool = True
    ) -> None:
        self.history, self._keeps_history = RoutingHistory(history), keeps_history
        self._limits = limits
        self._summarised: tuple[Segment | None, RoutingSummary, F64 | None] = (None, RoutingSummary(), None)
        self._counts = np.zeros(3, np.int64)  # instances, experts executed for them, most for one
        self._load_TE = np.zeros((0, 0), np.int64)

    def add(self, examples: ExampleBlock, active_B: NDArray[Any], load_TE: NDArray[Any]) -> None:
        """Add a batch: experts executed for each instance, and instances that each task sent to each expert."""
        if self._keeps_history:
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
        self._summarise()
        return self._summarised[1]

    def drift(self) -> F64 | None:
        """:func:`trainer.routing_figures.newest_drift`, computed once a segment. [T]"""
        self._summarise()
        return self._summarised[2]

    def _summarise(self) -> None:
        newest = self.history.closed[-1] if self.history.closed else None
        if newest is None or newest is not self._summarised[0]:
            drift_T = newest_drift(self.history)
            self._summarised = newest, _summary(self.history, self._limits, drift_T), drift_T

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
        self._ahead: tuple[Segment, RoutingSummary] | None = None  # if the segment ended now

    def before_step(self, examples: ExampleBlock) -> None:
        """End the open segment if it is full: the step to come belongs to the next one."""
        self.close_full_segment()
        self._pending += 1

    def after_step(self, examples: ExampleBlock, figures: StepFigures) -> None:
        """Add the step to the tally."""
        self._pending -= 1
        if figures.active_experts is not None and figures.expert_load is not None:
            self._tally.add(examples, figures.active_experts, figures.expert_load)

    def after_failed_step(self, examples: ExampleBlock) -> None:
        """Count nothing: the step changed nothing."""
        self._pending -= 1

    def close_full_segment(self) -> None:
        """End the open segment if it has all its steps, with what the present weights choose for the probe."""
        history = self._tally.history
        if not history.is_full(pending=self._pending > 0):
            return
        self._settle()
        choices_PTK = self._learner.choices(*history.probe)
        assert choices_PTK is not None, "only a ranker that routes has a history of its routing"
        history.close(choices_PTK.cpu().numpy())

    def summary_now(self) -> RoutingSummary:
        """Figures as of a run that ended now: an open segment that is full counts as ended. Changes nothing."""
        tally = self._tally
        if self._pending or not tally.history.is_full(pending=False):
            return tally.routing()
        last = tally.history.segments[-1]
        if self._ahead is None or self._ahead[0] is not last:
            choices_PTK = self._learner.choices(*tally.history.probe)
            assert choices_PTK is not None, "only a ranker that routes has a history of its routing"
            ended = tally.history.ended(choices_PTK.cpu().numpy())
            self._ahead = last, routing_summary(ended, self._learner.expert_limits)
        return self._ahead[1]
