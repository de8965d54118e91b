"""The experts over time, as plain JSON: which task sends how much to which expert, in each segment of the stream.

Segments are those of :mod:`trainer.routing_history`. A closed one never changes, so its text is made once.

Letters: T tasks, E experts.
"""

import json
import threading
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from smes.rankers.ranker import ExpertLimits
from smes.schema import MISSING
from trainer.routing_figures import dead_experts, drift, overlap, skew
from trainer.routing_history import Segment


class ExpertsOverTime:
    """Makes the JSON of a history's segments, and keeps what does not change. Thread-safe.

    The object has:

    - ``tasks``: names of the T tasks; ``num_experts``: E; ``always_on``: so many experts, the first ones, run for every
      instance; ``pools``: the others are so many equal pools. Without experts: 0 experts and no segment.
    - ``segments``: oldest first. ``steps``: ``[from, to)``, counted as the version is; ``event_time_ms`` of its newest
      example, null where it is not known; ``open``: whether it still goes on; ``instances``; ``load``: T × E, instances
      that each task sent to each expert; ``dead``: experts that no task used; ``load_skew``: largest over mean load of
      the experts that can be chosen.
    - ``shared``: T × T, the overlap (Jaccard) of two tasks' experts at the end of the newest segment that has ended;
      null before that.
    - ``drift``: for each segment T values, 1 − Jaccard of a task's experts since the segment before; null for the first
      and the open one.

    Args:
        tasks: Names of the T tasks.
        limits: Number of experts, and which can be chosen; None for a ranker without experts.
    """

    def __init__(self, tasks: Sequence[str], limits: ExpertLimits | None) -> None:
        self._tasks, self._limits = list(tasks), limits
        self._lock = threading.Lock()
        self._texts: dict[int, tuple[Segment, str]] = {}  # by the segment's identity
        self._drifts: dict[tuple[int, int], tuple[Segment, Segment, str]] = {}
        self._shared: tuple[Segment | None, str] = (None, "null")

    def text(self, segments: Sequence[Segment], first_step: int) -> str:
        """The object as JSON.

        Args:
            segments: Of a history; they are not changed any more.
            first_step: Steps that were taken before the first one.
        """
        limits = self._limits
        head = {
            "tasks": self._tasks,
            "num_experts": limits.num_experts if limits else 0,
            "always_on": limits.num_fixed if limits else 0,
            "pools": limits.num_pools if limits else 0,
        }
        if limits is None:
            segments = ()
        with self._lock:
            texts, at = [], first_step
            for segment in segments:
                times = {"steps": [at, at + segment.steps], "open": segment.choices_PTK is None}
                texts.append(f"{json.dumps(times)[:-1]}, {self._segment(segment)}")
                at += segment.steps
            drifts = ["null", *(self._drift(*pair) for pair in pairwise(segments))][: len(segments)]
            shared = self._overlap(segments)
            self._forget(segments)
        return (
            f'{json.dumps(head)[:-1]}, "segments": [{", ".join(texts)}], "shared": {shared}, '
            f'"drift": [{", ".join(drifts)}]}}'
        )

    def values(self, segments: Sequence[Segment], first_step: int) -> dict[str, Any]:
        """The object itself."""
        values: dict[str, Any] = json.loads(self.text(segments, first_step))
        return values

    def _segment(self, segment: Segment) -> str:
        """What of a segment does not depend on the others; the end of an object."""
        assert self._limits is not None, "there are no segments without experts"
        known = self._texts.get(id(segment))
        if known is None:
            time_ms = segment.event_time_ms
            figures = {
                "event_time_ms": None if time_ms == MISSING else time_ms,
                "instances": segment.instances,
                "dead": dead_experts(segment.load_TE),
                "load_skew": skew(segment.load_TE.sum(axis=0)[self._limits.num_fixed :]),
                "load": segment.load_TE.tolist(),
            }
            known = self._texts[id(segment)] = segment, json.dumps(figures)[1:]
        return known[1]

    def _drift(self, before: Segment, last: Segment) -> str:
        if before.choices_PTK is None or last.choices_PTK is None:
            return "null"
        key = id(before), id(last)
        if key not in self._drifts:
            values = drift(before.choices_PTK, last.choices_PTK).round(5).tolist()
            self._drifts[key] = before, last, json.dumps(values)
        return self._drifts[key][2]

    def _overlap(self, segments: Sequence[Segment]) -> str:
        newest = next((each for each in reversed(segments) if each.choices_PTK is not None), None)
        if newest is None:
            return "null"
        if newest is not self._shared[0]:
            assert newest.choices_PTK is not None, "it has ended"
            self._shared = newest, json.dumps(overlap(newest.choices_PTK).round(5).tolist())
        return self._shared[1]

    def _forget(self, segments: Sequence[Segment]) -> None:
        """Keep what is of these segments; the entries hold them, so no other object has their identity."""
        present = {id(segment) for segment in segments}
        self._texts = {key: value for key, value in self._texts.items() if key in present}
        self._drifts = {key: value for key, value in self._drifts.items() if present.issuperset(key)}
