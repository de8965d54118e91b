"""Publishing cuts without holding up the trainer: a mailbox for one cut, and a thread that encodes and uploads it.

The trainer's thread copies the weights (the cut); the publishing thread works on that copy. A new cut replaces one that
still waits in the mailbox, because serving wants the newest. The feedback noted for the older cut is added to the new
one; the scorer measures freshness by it (:mod:`trainer.freshness`).
"""

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from feature_store.feedback_times import FeedbackTimes
from feature_store.payload import encode
from feature_store.publication import Manifest
from feature_store.snapshots import SnapshotStore
from smes.errors import LeaseLost, SmesError, SnapshotStale
from smes.schema import Schema
from trainer.lease import LeaseKeeper

_logger = logging.getLogger(__name__)
_RETRY_S = 1.0
_ANSWER_S = 0.7  # a store that is there answers a small read in much less
_UNANSWERED = 2  # so many small reads without an answer: it is not there


@dataclass(frozen=True, slots=True)
class Cut:
    """The weights of one moment, and what their manifest says.

    Attributes:
        tensors: Copies that nothing else writes to (:meth:`smes.model.learner.Learner.serving_state`).
        step: Steps taken; becomes the version.
        positions: Topic → partition → next record to read.
        event_time_ms: Event time of the last example trained on; None before the first one.
        metrics: Plain JSON values.
        cut_ms: Wall time of the cut, Unix milliseconds.
        feedback: The feedback events trained on since the last cut.
    """

    tensors: dict[str, torch.Tensor]
    step: int
    positions: dict[str, dict[str, int]]
    event_time_ms: int | None
    metrics: dict[str, Any]
    cut_ms: int
    feedback: FeedbackTimes

    def with_feedback_of(self, older: "Cut") -> "Cut":
        """This cut, which contains the training of an older one that was not published, with its feedback, too."""
        return replace(self, feedback=FeedbackTimes.concat([older.feedback, self.feedback]))


class Publisher:
    """Publishes the newest cut, in its own thread.

    Attributes:
        published: Snapshots published.
        failures: Publications that failed; each was tried again.
        bytes_last: Bytes of the last snapshot published; None before the first.

    Args:
        store: Where snapshots go.
        schema: Goes into the snapshot.
        model: Model configuration as plain data; goes into the snapshot.
        lineage: The lineage that the weights belong to.
        now_ms: Wall clock, Unix milliseconds.
        lease: The lease to publish with; None for none, which the store allows while nobody holds it.
    """

    def __init__(
        self,
        store: SnapshotStore,
        schema: Schema,
        model: dict[str, Any],
        lineage: str,
        *,
        now_ms: Callable[[], int],
        lease: LeaseKeeper | None = None,
    ) -> None:
        self._store, self._schema, self._model, self.lineage, self._now_ms = store, schema, model, lineage, now_ms
        self._lease = lease
        self._changed = threading.Condition()
        self._waiting: Cut | None = None
        self._closing = False
        self._give_up_s = 0.0  # of the monotonic clock, once it is closing
        self.published = 0
        self.failures = 0
        self.bytes_last: int | None = None
        self._last_failure: str | None = None
        self._lost: LeaseLost | None = None
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._thread.start()

    def offer(self, cut: Cut) -> None:
        """Hand over a cut; returns at once.

        Raises:
            LeaseLost: Another trainer publishes in this namespace.
            SmesError: The publishing thread has ended, by :meth:`close` or on an unexpected error.
        """
        self.check()
        if not self.is_running:
            raise SmesError("the publishing thread has ended: its error is in the log above")
        with self._changed:
            if self._waiting is not None:
                cut = cut.with_feedback_of(self._waiting)
            self._waiting = cut
            self._changed.notify_all()

    def check(self) -> None:
        """Check that this publisher may still publish.

        Raises:
            LeaseLost: Another trainer publishes in this namespace.
        """
        if self._lost is not None:
            raise self._lost
        if self._lease is not None:
            self._lease.check()

    def close(self, timeout_s: float = 30.0) -> bool:
        """Publish the waiting cut, then stop; True if everything was published within ``timeout_s``.

        A store that does not answer is not waited for: then this takes a second or two.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            self._closing = True
            self._give_up_s = deadline_s
            self._changed.notify_all()
        unanswered = 0
        while unanswered < _UNANSWERED and self._thread.is_alive() and time.monotonic() < deadline_s:
            answers = self._ask_store()
            self._thread.join(min(_ANSWER_S, max(0.0, deadline_s - time.monotonic())))
            unanswered = unanswered + 1 if not answers else 0 if answers[0] else _UNANSWERED
        with self._changed:
            self._give_up_s = 0.0
            self._changed.notify_all()
        return not self._thread.is_alive() and self._waiting is None

    def _ask_store(self) -> list[bool]:
        """Ask the store for a small read, in a thread of its own.

        The list gets an entry when it is clear whether the store is there.
        """
        answers: list[bool] = []

        def ask() -> None:
            try:
                self._store.pointer()
                answers.append(True)
            except SmesError:
                answers.append(False)

        threading.Thread(target=ask, name="publisher-probe", daemon=True).start()
        return answers

    @property
    def has_waiting(self) -> bool:
        """Whether a cut waits in the mailbox."""
        with self._changed:
            return self._waiting is not None

    @property
    def is_running(self) -> bool:
        """Whether the publishing thread runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closing)
                cut, self._waiting = self._waiting, None
            if cut is None:
                return
            try:
                published = self._publish(cut)
            except LeaseLost as error:  # nothing more will be published: the trainer's thread hears it by check()
                self._lost, self._waiting = error, cut
                return
            if not published and self._put_back(cut):
                return

    def _put_back(self, cut: Cut) -> bool:
        """After a failure: put the cut back and pause before the next try; True if no time is left for one."""
        with self._changed:
            if self._waiting is None:
                self._waiting = cut
            else:
                self._waiting = self._waiting.with_feedback_of(cut)
            if not self._closing:
                self._changed.wait_for(lambda: self._closing, timeout=_RETRY_S)
                return False
            if time.monotonic() + _RETRY_S >= self._give_up_s:
                return True
            self._changed.wait(_RETRY_S)
            return False

    def _publish(self, cut: Cut) -> bool:
        started_s = time.monotonic()
        payload = snapshot_payload(cut, self._schema, self._model, self.lineage)
        try:
            self._store.publish(
                payload,
                lineage=self.lineage,
                version=cut.step,
                schema_hash=self._schema.hash,
                step=cut.step,
                created_ms=cut.cut_ms,
                event_time_ms=cut.event_time_ms,
                positions=cut.positions,
                metrics=cut.metrics,
                feedback_arrivals=cut.feedback.merged().rows(),
                now_ms=self._now_ms,
                fencing=None if self._lease is None else self._lease.number,
            )
        except SnapshotStale as error:
            _logger.info("%s", error)
            return True
        except LeaseLost:
            raise
        except SmesError as error:
            # Serving keeps what it has; the next cut contains this one's training.
            self.failures += 1
            level = logging.DEBUG if str(error) == self._last_failure else logging.WARNING  # once for each reason
            _logger.log(level, "snapshot of step %d not published, trying again: %s", cut.step, error)
            self._last_failure = str(error)
            return False
        self.published += 1
        self._last_failure = None
        self.bytes_last = len(payload)
        _logger.debug("published %s:%d in %.0f ms", self.lineage, cut.step, 1000 * (time.monotonic() - started_s))
        return True


def snapshot_payload(cut: Cut, schema: Schema, model: dict[str, Any], lineage: str) -> bytes:
    """The bytes that serving loads; see :mod:`feature_store.payload`.

    Args:
        cut: Weights and version.
        schema: The schema trained with.
        model: Model configuration as plain data.
        lineage: The lineage that the weights belong to.
    """
    return encode(
        cut.tensors,
        {
            "schema": json.dumps(schema.to_dict()),
            "schema_hash": schema.hash,
            "model": json.dumps(model),
            "lineage": lineage,
            "version": str(cut.step),
        },
    )


def lineage_to_publish(lineage: str, step: int, served: Manifest | None) -> str:
    """The lineage under which a trainer publishes: its own, or a fork of it.

    If serving already has a later version of the trainer's lineage, the trainer died after its last checkpoint. What it
    trains now is another history from that checkpoint on. It gets a name of its own, so that no version names two sets
    of weights.

    Args:
        lineage: The trainer's lineage.
        step: Steps taken.
        served: Manifest of the snapshot that is served, if any.
    """
    if served is None:
        return lineage
    if served.lineage != lineage:
        _logger.log(
            logging.INFO if root_of(served.lineage) == root_of(lineage) else logging.WARNING,
            "version %d of lineage %s is served; lineage %s takes its place with its first cut",
            served.version,
            served.lineage,
            lineage,
        )
        return lineage
    if served.version <= step:
        return lineage
    forked = new_lineage(lineage)
    _logger.warning(
        "version %d of lineage %s is served but the checkpoint is of step %d: continuing as lineage %s",
        served.version,
        lineage,
        step,
        forked,
    )
    return forked


def new_lineage(parent: str | None = None) -> str:
    """A name for a new history of weights; the name of a fork begins with the root of its parent's name."""
    return f"{root_of(parent)}.{uuid.uuid4().hex[:4]}" if parent else uuid.uuid4().hex[:8]


def root_of(lineage: str) -> str:
    """The name that a lineage shares with all that it forked from."""
    return lineage.partition(".")[0]
