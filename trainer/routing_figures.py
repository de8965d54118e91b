"""Figures of the routing's history: load, dead experts, skew, overlap between tasks, drift between versions.

Letters: T tasks, E experts, K experts that a task chooses, P instances of the probe, L experts of a pool, N anything.
"""

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smes.arrays import F64
from smes.rankers.ranker import ExpertLimits
from trainer.report import RoutingSummary
from trainer.routing_history import RoutingHistory, Segment


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


def routing_summary(history: RoutingHistory, limits: ExpertLimits | None) -> RoutingSummary:
    """Figures of the newest segment that has ended; of the open one if none has."""
    segments = history.closed or history.segments
    if limits is None or not segments:
        return RoutingSummary()
    last = segments[-1]
    mean_overlap = mean_drift = None
    if last.choices_PTK is not None:
        others = overlap(last.choices_PTK)[np.triu_indices(len(last.load_TE), k=1)]
        mean_overlap = float(others.mean()) if others.size else None
        before = segments[-2].choices_PTK if len(segments) > 1 else None
        mean_drift = float(drift(before, last.choices_PTK).mean()) if before is not None else None
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
