"""The routing over time: the load of equal stretches of the stream, and what versions choose for the same instances.

Memory is bounded whatever the length of the stream: when there are ``MOST_STRETCHES``, neighbours are joined in pairs,
and stretches are twice as long from then on. A stretch is a number of steps, so where one ends depends on the examples
alone.

Letters: B instances of a batch, T tasks, E experts, K experts that a task chooses, P instances of the probe, W id
columns, F numeric features, S stretches.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smes.arrays import F32, I64
from smes.events import ExampleBlock

FIRST_STEPS = 32
"""Steps of a stretch at first."""
MOST_STRETCHES = 32
PROBE = 512
"""Most instances of the probe."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of the stream.

    Attributes:
        steps: Its batches.
        instances: Their examples.
        load_TE: int64, instances that each task sent to each expert.
        choices_PTK: int32, experts that each task chooses for the probe by the weights at the stretch's end; None while
            it has not ended.
    """

    steps: int
    instances: int
    load_TE: I64
    choices_PTK: NDArray[np.int32] | None


class RoutingHistory:
    """Stretches of the stream from its first batch on, the last one open; none for a ranker without experts.

    The probe is a sample of the first stretch, spread evenly over each of its batches, with its features as they were.
    """

    def __init__(self) -> None:
        self._closed: list[Stretch] = []
        self._steps = FIRST_STEPS  # of a stretch, by now
        self._open = Stretch(0, 0, np.zeros((0, 0), np.int64), None)
        self._probe: list[tuple[I64, F32]] = []

    @property
    def closed(self) -> tuple[Stretch, ...]:
        """Those that have ended, of equal length."""
        return tuple(self._closed)

    @property
    def stretches(self) -> tuple[Stretch, ...]:
        """All, the open one last unless it is empty."""
        return (*self._closed, self._open) if self._open.steps else self.closed

    @property
    def probe(self) -> tuple[I64, F32]:
        """(ids int64 [P, W], numerics float32 [P, F])."""
        ids, numerics = (np.concatenate(parts) for parts in zip(*self._probe, strict=True))
        self._probe = [(ids, numerics)]
        return ids, numerics

    def add(self, examples: ExampleBlock, load_TE: NDArray[Any]) -> None:
        """Take a step's batch of B ≥ 1, and how many of it each task sent to each expert."""
        if not self._closed:
            B = len(examples)
            count = min(B, PROBE // FIRST_STEPS)
            rows = np.arange(count) * B // count
            self._probe.append((examples.ids[rows], examples.numerics[rows]))
        before = self._open
        load = load_TE.astype(np.int64) if before.steps == 0 else before.load_TE + load_TE
        self._open = Stretch(before.steps + 1, before.instances + len(examples), load, None)

    def ends_with(self, pending: bool) -> bool:
        """Whether the open stretch has all its steps, one that is still to be added counted if it is ``pending``."""
        return self._open.steps > 0 and self._open.steps + pending >= self._steps

    def close(self, choices_PTK: NDArray[Any]) -> None:
        """End the open stretch: what the weights of this moment choose for the probe."""
        whole = self._open
        self._closed.append(Stretch(whole.steps, whole.instances, whole.load_TE, choices_PTK.astype(np.int32)))
        self._open = Stretch(0, 0, np.zeros((0, 0), np.int64), None)
        if len(self._closed) == MOST_STRETCHES:
            self._closed = [_joined(*pair) for pair in zip(self._closed[::2], self._closed[1::2], strict=True)]
            self._steps *= 2

    def state(self) -> dict[str, NDArray[Any]]:
        """Arrays from which :meth:`of_state` goes on."""
        state: dict[str, NDArray[Any]] = {
            "steps": np.array([self._steps, *(stretch.steps for stretch in self.stretches)]),
            "instances": np.array([stretch.instances for stretch in self.stretches], np.int64),
        }
        if self.stretches:
            state["load_STE"] = np.stack([stretch.load_TE for stretch in self.stretches])
            state["probe_ids"], state["probe_numerics"] = self.probe
        if self._closed:
            state["choices_SPTK"] = np.stack([s.choices_PTK for s in self._closed if s.choices_PTK is not None])
        return state

    @classmethod
    def of_state(cls, state: dict[str, NDArray[Any]]) -> "RoutingHistory":
        """The inverse of :meth:`state`."""
        history = cls()
        history._steps, *steps = (int(n) for n in state["steps"])
        choices = [*state["choices_SPTK"]] if "choices_SPTK" in state else []
        for s, count in enumerate(steps):
            at_end = choices[s].copy() if s < len(choices) else None
            stretch = Stretch(count, int(state["instances"][s]), state["load_STE"][s].copy(), at_end)
            if at_end is not None:
                history._closed.append(stretch)
            else:
                history._open = stretch
        if steps:
            history._probe = [(state["probe_ids"].copy(), state["probe_numerics"].copy())]
        return history


def _joined(one: Stretch, next_one: Stretch) -> Stretch:
    return Stretch(
        one.steps + next_one.steps,
        one.instances + next_one.instances,
        one.load_TE + next_one.load_TE,
        next_one.choices_PTK,
    )
