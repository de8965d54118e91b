"""A shadow scores the requests that the main arm answered, after the answers, and is only measured.

Letters: N items, T tasks.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from smes.arrays import F32
from smes_scorer.arm_telemetry import ArmTelemetry
from smes_scorer.interface import Asked, Interfaces
from smes_scorer.versions import InService

_NICENESS = 10
_END = None
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answered:
    """A request that was answered.

    Attributes:
        asked: The request, under the schema of the version that answered.
        scores: float32 [N, T], the main arm's.
    """

    asked: Asked
    scores: F32


class ShadowScorer:
    """Scores answered requests in a thread of its own, which gives way to all others.

    A request that finds the queue full is left out and counted: a shadow never delays an answer by waiting, and what it
    raises is counted and goes no further. It takes time on the processor, though, where no core is idle.

    Args:
        name: Of the arm.
        swap: Its version in service.
        is_ready: Whether that version may score, as of :attr:`smes_scorer.arms.Arm.is_ready`: one that was held and is
            not any more may not.
        interfaces: Read a request again where the arm's schema is another than the main arm's.
        telemetry: Counts.
        max_waiting: Most requests that wait.
    """

    def __init__(
        self,
        name: str,
        swap: InService,
        is_ready: Callable[[], bool],
        interfaces: Interfaces,
        telemetry: ArmTelemetry,
        *,
        max_waiting: int,
    ) -> None:
        self.name = name
        self._swap, self._is_ready, self._interfaces, self._telemetry = swap, is_ready, interfaces, telemetry
        self._queue: queue.Queue[Answered | None] = queue.Queue(max_waiting)
        self._thread = threading.Thread(target=self._run, name=f"shadow-{name}", daemon=True)
        self._stopping = threading.Event()

    def start(self) -> None:
        """Start the thread; call it once."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what waits is left out."""
        self._stopping.set()
        with suppress(queue.Full):  # then the thread is busy and looks at the event next
            self._queue.put_nowait(_END)
        if self._thread.ident is not None:
            self._thread.join()

    def offer(self, answered: Answered) -> None:
        """Have a request scored if there is room. Never waits, never raises."""
        try:
            self._queue.put_nowait(answered)
        except queue.Full:
            self._telemetry.shadow(self.name, "dropped")

    def _run(self) -> None:
        _give_way()
        while (answered := self._queue.get()) is not _END and not self._stopping.is_set():
            assert answered is not None
            try:
                self._score(answered)
            except Exception:
                self._telemetry.shadow(self.name, "failed")
                _logger.warning("shadow %s could not score a request", self.name, exc_info=True)

    def _score(self, answered: Answered) -> None:
        if not self._is_ready():
            self._telemetry.shadow(self.name, "not_ready")
            return
        asked = self._interfaces.of(self._swap.schema).again(answered.asked, to_answer=False)
        started_s = time.perf_counter()
        with self._swap.reading() as served:
            if served.schema.hash != asked.schema.hash:  # it came into service this moment
                self._telemetry.shadow(self.name, "not_ready")
                return
            scores = served.model.score(asked.rows.ids, asked.rows.numerics, asked.now_ms)
        took_s = time.perf_counter() - started_s
        if not np.isfinite(scores).all():
            self._telemetry.shadow(self.name, "failed")
            return
        self._telemetry.shadow(self.name, "scored")
        self._telemetry.shadow_took(self.name, took_s)
        main = answered.asked.schema
        for i, task in enumerate(served.schema.tasks):
            column = main.task_index.get(task.name)
            if column is not None:  # tasks that both have
                scale = 1.0 if task.kind == "binary" else task.max_value
                differences_N = (scores[:, i].astype(np.float64) - answered.scores[:, column]) / scale
                self._telemetry.differences(self.name, task.name, differences_N)


def _give_way() -> None:
    """Lower this thread's priority below those that answer, where the system has one for each thread."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
    except (AttributeError, OSError):
        _logger.debug("a shadow's thread keeps the priority of all", exc_info=True)
