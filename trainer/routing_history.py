"""The routing over time: the load on the experts in equal segments of the stream, and choices for a fixed probe.

Memory stays bounded however long the stream is: when ``most_segments`` have ended, each pair of neighbours is merged,
and later segments are twice as long. A segment is a number of steps, so where it ends depends on the examples alone.

Letters: B instances of a batch, T tasks, E experts, K experts that a task chooses, P instances of the probe, W id
columns, F numeric features, S segments.
"""

import copy
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, MultipleOf
from numpy.typing import NDArray

from smes.arrays import F32, I64
from smes.events import ExampleBlock
from smes.ranges import PositiveInt, check_ranges
from smes.schema import MISSING


@dataclass(frozen=True)
class RoutingHistoryConfig:
    """How finely the routing's history is kept.

    Attributes:
        first_steps: Steps of a segment at first, ≥ 1.
        most_segments: Ended segments at which neighbours are merged, an even number ≥ 2.
        probe: Most instances of the probe, ≥ ``first_steps``: each step of the first segment adds its part.
    """

    first_steps: PositiveInt = 32
    most_segments: Annotated[int, Ge(2), MultipleOf(2)] = 32
    probe: PositiveInt = 512

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.probe < self.first_steps:
            raise ValueError(
                f"RoutingHistoryConfig.probe: {self.probe}, expected at least first_steps ({self.first_steps})"
            )


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of the stream.

    Attributes:
        steps: Batches in it.
        instances: Examples in it.
        load_TE: int64, instances that each task sent to each expert.
        choices_PTK: int32, experts that each task chooses for the probe with the weights at the segment's end; None
            while the segment is open.
        event_time_ms: Event time of its newest example, Unix milliseconds; :data:`smes.schema.MISSING` where it is not
            known: without an example, or from a checkpoint of before this was kept.
    """

    steps: int
    instances: int
    load_TE: I64
    choices_PTK: NDArray[np.int32] | None
    event_time_ms: int = MISSING


class RoutingHistory:
    """Segments of the stream from its first batch on; the last one is open. Empty for a ranker without experts.

    The probe is a sample of the first segment: evenly spaced examples of each of its batches, with the features that
    they had then.

    Args:
        config: Lengths and bounds; None for the default ones.
    """

    def __init__(self, config: RoutingHistoryConfig | None = None) -> None:
        self._config = config or RoutingHistoryConfig()
        self._closed: list[Segment] = []
        self._steps = self._config.first_steps  # of a segment now
        self._open = _empty_segment()
        self._probe: list[tuple[I64, F32, I64]] = []

    @property
    def closed(self) -> tuple[Segment, ...]:
        """The segments that have ended, all of the same length."""
        return tuple(self._closed)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All segments; the open one comes last, and is left out while it is empty."""
        return (*self._closed, self._open) if self._open.steps else self.closed

    @property
    def probe(self) -> tuple[I64, F32, I64]:
        """(ids int64 [P, W], numerics float32 [P, F], event times in Unix milliseconds int64 [P])."""
        ids, numerics, time_ms = (np.concatenate(parts) for parts in zip(*self._probe, strict=True))
        self._probe = [(ids, numerics, time_ms)]
        return ids, numerics, time_ms

    def add(self, examples: ExampleBlock, load_TE: NDArray[Any]) -> None:
        """Add a step: its batch of B ≥ 1 examples, and how many of them each task sent to each expert."""
        if not self._closed:
            B = len(examples)
            count = min(B, self._config.probe // self._config.first_steps)
            rows = np.arange(count) * B // count
            self._probe.append((examples.ids[rows], examples.numerics[rows], examples.event_time_ms[rows]))
        before = self._open
        load = load_TE.astype(np.int64) if before.steps == 0 else before.load_TE + load_TE
        newest_ms = max(before.event_time_ms, int(examples.event_time_ms.max()))
        self._open = Segment(before.steps + 1, before.instances + len(examples), load, None, newest_ms)

    def is_full(self, *, pending: bool) -> bool:
        """Whether the open segment has all its steps. ``pending`` counts one step that is still to be added."""
        return self._open.steps > 0 and self._open.steps + pending >= self._steps

    def close(self, choices_PTK: NDArray[Any]) -> None:
        """End the open segment, with what the present weights choose for the probe."""
        ended = self._open
        self._closed.append(replace(ended, choices_PTK=choices_PTK.astype(np.int32)))
        self._open = _empty_segment()
        if len(self._closed) == self._config.most_segments:
            self._closed = [_merged(*pair) for pair in zip(self._closed[::2], self._closed[1::2], strict=True)]
            self._steps *= 2

    def ended(self, choices_PTK: NDArray[Any]) -> "RoutingHistory":
        """What this history would be if the open segment ended now; this one stays as it is."""
        other = copy.copy(self)
        other._closed = list(self._closed)
        other.close(choices_PTK)
        return other

    def state(self) -> dict[str, NDArray[Any]]:
        """Arrays from which :meth:`load_state` continues."""
        state: dict[str, NDArray[Any]] = {
            "steps": np.array([self._steps, *(segment.steps for segment in self.segments)]),
            "instances": np.array([segment.instances for segment in self.segments], np.int64),
            "event_time_ms": np.array([segment.event_time_ms for segment in self.segments], np.int64),
        }
        if self.segments:
            state["load_STE"] = np.stack([segment.load_TE for segment in self.segments])
            state["probe_ids"], state["probe_numerics"], state["probe_time_ms"] = self.probe
        if self._closed:
            state["choices_SPTK"] = np.stack([s.choices_PTK for s in self._closed if s.choices_PTK is not None])
        return state

    def load_state(self, state: dict[str, NDArray[Any]]) -> None:
        """The inverse of :meth:`state`."""
        self._steps, *steps = (int(n) for n in state["steps"])
        choices = [*state["choices_SPTK"]] if "choices_SPTK" in state else []
        self._closed, self._open = [], _empty_segment()
        for s, count in enumerate(steps):
            at_end = choices[s].copy() if s < len(choices) else None
            newest_ms = int(state["event_time_ms"][s]) if "event_time_ms" in state else MISSING
            segment = Segment(count, int(state["instances"][s]), state["load_STE"][s].copy(), at_end, newest_ms)
            if at_end is not None:
                self._closed.append(segment)
            else:
                self._open = segment
        self._probe = []
        if steps:
            self._probe.append(
                (state["probe_ids"].copy(), state["probe_numerics"].copy(), state["probe_time_ms"].copy())
            )


def _empty_segment() -> Segment:
    return Segment(0, 0, np.zeros((0, 0), np.int64), None)


def _merged(one: Segment, next_one: Segment) -> Segment:
    return Segment(
        one.steps + next_one.steps,
        one.instances + next_one.instances,
        one.load_TE + next_one.load_TE,
        next_one.choices_PTK,
        max(one.event_time_ms, next_one.event_time_ms),
    )
