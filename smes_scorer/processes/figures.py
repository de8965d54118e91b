"""What all processes of a service have counted, told by whichever of them is asked.

In ``/metrics`` every series has the label ``worker``: its process's number, or ``loader``. A counter that begins anew,
because its process does, is a series of its own. ``/v1/stats`` adds up what the processes that live have counted.
"""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from smes_scorer.processes.board import LOADER
from smes_scorer.processes.follower import WorkerPlace
from smes_scorer.telemetry import Telemetry

_ANSWER_WITHIN_S = 1.0
_PREFIXES = ("smes_scorer_arm_", "smes_scorer_")
_OF_THE_LOADER = frozenset(
    (
        "swaps",
        "full_loads",
        "shadows",
        "load_failures",
        "versions_answered",
        "freshness_uncounted",
        "freshness_milliseconds",
        "freshness_stage_milliseconds",
        "pinned",
    )
)
_OF_ALL = frozenset(("refusals", "store_damage"))
"""Beside the series of the process itself."""


class Figures(msgspec.Struct, frozen=True):
    """What a process has counted.

    Attributes:
        families: Name, documentation, type, and samples by name, labels and value.
        state: As of :meth:`smes_scorer.telemetry.Telemetry.state`.
    """

    families: list[tuple[str, str, str, list[tuple[str, dict[str, str], float]]]]
    state: dict[str, Any]

    @classmethod
    def of(cls, telemetry: Telemetry, worker: int) -> "Figures":
        """Those that a process shows, of all that its telemetry has."""
        families = [
            (
                family.name,
                family.documentation,
                family.type,
                [(sample.name, dict(sample.labels), float(sample.value)) for sample in family.samples],
            )
            for family in telemetry.registry.collect()
            if _is_shown(family.name, worker)
        ]
        return cls(families, telemetry.state())

    def to_bytes(self) -> bytes:
        """MessagePack, which has infinity and NaN, too: a series may have such a value."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def from_bytes(cls, answer: bytes) -> "Figures":
        """The inverse of :meth:`to_bytes`."""
        return msgspec.msgpack.decode(answer, type=cls)


class AllFigures(Collector):
    """The figures of all processes, asked for when they are wanted.

    Args:
        place: Of this process.
        telemetry: Of this process.
    """

    def __init__(self, place: WorkerPlace, telemetry: Telemetry) -> None:
        self._place, self._telemetry = place, telemetry
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def own(self) -> bytes:
        """What this process answers when it is asked."""
        return Figures.of(self._telemetry, self._place.worker).to_bytes()

    def summary(self) -> dict[str, object]:
        """As :meth:`smes_scorer.telemetry.Telemetry.summary`, of all processes that live and answer within a second."""
        together = Telemetry()
        for _, figures in self._gathered():
            together.add_state(figures.state)
        board = self._place.board
        alive = sum(map(board.alive, range(board.workers)))
        return {**together.summary(), "processes": {"alive": alive, "restarts": board.restarts}}

    def describe(self) -> list[Metric]:
        """Nothing: no process is asked when this is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All series, each with its process."""
        families: dict[str, Metric] = {}
        for worker, figures in self._gathered():
            label = "loader" if worker == LOADER else str(worker)
            for name, documentation, kind, samples in figures.families:
                family = families.setdefault(name, Metric(name, documentation, kind))
                for sample, labels, value in samples:
                    family.add_sample(sample, {"worker": label, **labels}, value)
        yield from families.values()
        board = self._place.board
        alive = sum(map(board.alive, range(board.workers)))
        yield GaugeMetricFamily("smes_scorer_processes", "Processes that answer and live", value=alive)
        restarts = "Processes that were started again, since the service began"
        yield CounterMetricFamily("smes_scorer_process_restarts", restarts, value=board.restarts)

    def _gathered(self) -> Iterator[tuple[int, Figures]]:
        place, until_s = self._place, time.monotonic() + _ANSWER_WITHIN_S
        for worker in (*range(place.board.workers), LOADER):
            if worker == place.worker:
                yield worker, Figures.of(self._telemetry, worker)
            elif place.board.alive(worker):
                box = place.loader if worker == LOADER else place.boxes[worker]
                answer = box.ask(max(0.01, until_s - time.monotonic()))
                if answer is not None:
                    yield worker, Figures.from_bytes(answer)


def _is_shown(family: str, worker: int) -> bool:
    name = next((family.removeprefix(prefix) for prefix in _PREFIXES if family.startswith(prefix)), None)
    if name is None or name in _OF_ALL:
        return True
    return (name in _OF_THE_LOADER) == (worker == LOADER)


def merged_refusals(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What two processes refused, as :meth:`smes_scorer.refused.Refused.summary`: counts added, the later one named."""
    merged = dict(one)
    for reason, said in other.items():
        if reason in merged:
            last = max(merged[reason], said, key=lambda each: str(each["at"]))
            said = {**last, "count": merged[reason]["count"] + said["count"]}
        merged[reason] = said
    return merged
