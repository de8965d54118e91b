"""Publishing cuts without holding up the trainer: a mailbox of one, and a thread that encodes and uploads.

The trainer's thread copies the weights (the cut); everything after works on that copy. A cut that finds the mailbox
occupied takes its place: serving wants the newest, and the feedback that the older one stood for is carried over.
"""

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from feature_store.payload import encode
from feature_store.snapshots import SnapshotStore
from smes.arrays import I64
from smes.errors import SmesError, SnapshotStale
from smes.schema import Schema

_logger = logging.getLogger(__name__)
_MAX_ARRIVALS = 512
_RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class Cut:
    """The weights of one moment and what the manifest says of it.

    Attributes:
        tensors: Copies that nobody else writes to (:meth:`smes.model.learner.Learner.serving_state`).
        step: Steps taken; the version.
        positions: Topic → partition → next record to read.
        event_time_ms: Event time reached, None before the first example.
        metrics: Plain JSON values.
        feedback_arrivals: Arrival (Unix milliseconds) → feedback events trained on since the cut before.
    """

    tensors: dict[str, torch.Tensor]
    step: int
    positions: dict[str, dict[str, int]]
    event_time_ms: int | None
    metrics: dict[str, Any]
    feedback_arrivals: Counter[int]


class Publisher:
    """Publishes the newest cut, in a thread of its own.

    Args:
        store: Where to.
        schema: Goes into the snapshot.
        model: Model configuration as plain data; goes into the snapshot.
        lineage: The history that the weights belong to.
        now_ms: Wall clock, Unix milliseconds.
    """

    def __init__(
        self, store: SnapshotStore, schema: Schema, model: dict[str, Any], lineage: str, *, now_ms: Callable[[], int]
    ) -> None:
        self._store, self._schema, self._model, self.lineage, self._now_ms = store, schema, model, lineage, now_ms
        self._changed = threading.Condition()
        self._waiting: Cut | None = None
        self._closing = False
        self._give_up_s = 0.0  # of the monotonic clock, once it is closing
        self.published = 0
        self.failures = 0
        self.bytes_last: int | None = None
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._thread.start()

    def offer(self, cut: Cut) -> None:
        """Hand over a cut and return at once.

        Raises:
            SmesError: The publishing thread ended on an error that it did not expect.
        """
        if not self._thread.is_alive():
            raise SmesError("the publishing thread has ended: its error is in the log above")
        with self._changed:
            if self._waiting is not None:
                cut.feedback_arrivals.update(self._waiting.feedback_arrivals)
            self._waiting = cut
            self._changed.notify_all()

    def close(self, timeout_s: float = 30.0) -> bool:
        """Publish what waits, then stop; whether everything was published within ``timeout_s``.

        A store that is away is asked again until then.
        """
        with self._changed:
            self._closing = True
            self._give_up_s = time.monotonic() + timeout_s
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive() and self._waiting is None

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closing)
                cut, self._waiting = self._waiting, None
            if cut is None:
                return
            if not self._publish(cut) and self._put_back(cut):
                return

    def _put_back(self, cut: Cut) -> bool:
        """After a failure: wait a moment, then try again with the newest; true if there is no time left for that."""
        with self._changed:
            if self._waiting is None:
                self._waiting = cut
            else:
                self._waiting.feedback_arrivals.update(cut.feedback_arrivals)
            if not self._closing:
                self._changed.wait_for(lambda: self._closing, timeout=_RETRY_S)
                return False
            if time.monotonic() + _RETRY_S >= self._give_up_s:
                return True
            self._changed.wait(_RETRY_S)
            return False

    def _publish(self, cut: Cut) -> bool:
        started_s = time.monotonic()
        payload = encode(
            cut.tensors,
            {
                "schema": json.dumps(self._schema.to_dict()),
                "schema_hash": self._schema.hash,
                "model": json.dumps(self._model),
                "lineage": self.lineage,
                "version": str(cut.step),
            },
        )
        try:
            self._store.publish(
                payload,
                lineage=self.lineage,
                version=cut.step,
                schema_hash=self._schema.hash,
                step=cut.step,
                created_ms=self._now_ms(),
                event_time_ms=cut.event_time_ms,
                positions=cut.positions,
                metrics=cut.metrics,
                feedback_arrivals=summarise_arrivals(cut.feedback_arrivals),
            )
        except SnapshotStale as error:
            _logger.info("%s", error)
            return True
        except SmesError as error:
            # Serving keeps what it has; the next cut stands for this one too.
            self.failures += 1
            _logger.warning("snapshot of step %d not published, trying again: %s", cut.step, error)
            return False
        self.published += 1
        self.bytes_last = len(payload)
        _logger.debug("published %s:%d in %.0f ms", self.lineage, cut.step, 1000 * (time.monotonic() - started_s))
        return True


def count_arrivals(arrival_ms: I64) -> Counter[int]:
    """How many feedback events arrived at each millisecond. int64, any shape, no ``MISSING``."""
    values, counts = np.unique(arrival_ms, return_counts=True)
    return Counter(dict(zip(values.tolist(), counts.tolist(), strict=True)))


def summarise_arrivals(arrivals: Counter[int]) -> tuple[tuple[int, int], ...]:
    """(arrival in Unix milliseconds, count) pairs, at most 512: of more, neighbours are merged into their mean."""
    pairs = sorted(arrivals.items())
    if len(pairs) <= _MAX_ARRIVALS:
        return tuple(pairs)
    summary = []
    for part in np.array_split(np.array(pairs, np.int64), _MAX_ARRIVALS):
        count = int(part[:, 1].sum())
        offset = (part[:, 0] - part[0, 0]) * part[:, 1]
        summary.append((int(part[0, 0]) + round(int(offset.sum()) / count), count))
    return tuple(summary)
