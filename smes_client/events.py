"""Sends impressions and feedback to the event log: checked at once, delivered in batches by a thread of its own.

An event is checked in the caller's thread and put into a bounded buffer. One thread takes batches out of it and appends
them; while a batch is on its way, the next one fills. What becomes of each event is told by its delivery report. At the
end of the program the buffer is emptied first.
"""

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from smes.schema import Schema
from smes_client.addresses import Access, open_log
from smes_client.batches import Encoded, records_of
from smes_client.checked import EventForms, Id, id_of
from smes_client.errors import BufferFull, DeliveryFailed
from smes_client.schemas import load_schema
from smes_io.clock import wall_clock_ms
from stream.codec.record_headers import Codec
from stream.log.event_log import ReportingLog
from stream.topics import FEEDBACK, IMPRESSIONS

_LOOK_S = 0.2  # between two looks at whether the program is at its end
_log = logging.getLogger(__name__)


class Delivered(NamedTuple):
    """Where an event is.

    Attributes:
        topic: ``impressions`` or ``feedback``.
        partition: Its partition there.
        offset: Of its record; None where the server has it, but no longer says where. Events of one record have the
            same.
    """

    topic: str
    partition: int
    offset: int | None


class Sent(NamedTuple):
    """An event on its way.

    Attributes:
        impression_id: Of the impression, for its feedback.
        delivery: Its delivery report: a :class:`Delivered`, or the error that kept it out of the log.
    """

    impression_id: int
    delivery: "Future[Delivered]"


@dataclass(frozen=True, slots=True)
class Counts:
    """What became of the events so far.

    Attributes:
        delivered: Acknowledged by the event log.
        failed: Not acknowledged.
        waiting: In the buffer or on their way.
    """

    delivered: int
    failed: int
    waiting: int


class _Waiting(NamedTuple):
    event: Encoded
    delivery: "Future[Delivered]"
    since_s: float


class Events:
    """A producer of events. Thread-safe.

    Args:
        schema: The deployment's: a schema or its file.
        log: Address of the event log, as :func:`smes_client.addresses.open_log` takes it; or an open log, which is
            closed with this.
        namespace: Of the deployment.
        access: How the server lets us in (:class:`smes_io.redis_access.RedisAccess`,
            :class:`stream.log.kafka_access.KafkaAccess`).
        codec: ``json``, one record an event; or ``arrow``, one record a batch and partition, which needs pyarrow.
        by_request: Whether what impressions of a request share is sent once. They must follow each other: give
            :meth:`impression` those of a request, with its ``request``, one after another. In JSON those of a batch
            and partition are one record.
        partitions: Of a topic that does not exist yet.
        batch_events: Most events of a batch.
        linger_s: How long an event waits for others, seconds.
        buffer_events: Most events in the buffer and on their way.
        block_s: How long a call waits for room in the buffer, seconds.
        delivery_timeout_s: How long a batch is tried while the server is away, seconds.
        on_delivery: Called in the sending thread with each event and its report.
        now_ms: Wall clock in Unix milliseconds.

    Raises:
        ValueError: An argument is out of range.
        EventLogUnavailable, EventLogError: The event log cannot be reached, or does not let us in.
    """

    def __init__(
        self,
        schema: Schema | str | Path,
        log: str | ReportingLog,
        *,
        namespace: str = "smes",
        access: Access = None,
        codec: Codec = "json",
        by_request: bool = False,
        partitions: int = 2,
        batch_events: int = 500,
        linger_s: float = 0.05,
        buffer_events: int = 10_000,
        block_s: float = 10.0,
        delivery_timeout_s: float = 30.0,
        on_delivery: Callable[[Sent], object] | None = None,
        now_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        for name, number, least in (
            ("batch_events", batch_events, 1),
            ("buffer_events", buffer_events, 1),
            ("linger_s", linger_s, 0),
            ("block_s", block_s, 0),
            ("delivery_timeout_s", delivery_timeout_s, 0),
        ):
            if not number >= least:
                raise ValueError(f"{name}: {number}, expected at least {least}")
        if codec not in ("json", "arrow"):
            raise ValueError(f"codec: {codec!r}, expected 'json' or 'arrow'")
        if codec == "arrow" and find_spec("pyarrow") is None:
            raise ValueError("codec: 'arrow' needs pyarrow, which is not installed, expected 'json'")
        self._schema, self._codec, self._by_request = load_schema(schema), codec, by_request
        self._forms = EventForms(self._schema, now_ms)
        self._batch_events, self._linger_s = batch_events, linger_s
        self._buffer_events, self._block_s = buffer_events, block_s
        self._on_delivery = on_delivery
        if isinstance(log, str):
            log = open_log(log, namespace, access, delivery_timeout_s=delivery_timeout_s)
        self._event_log = log
        try:
            for topic in (IMPRESSIONS, FEEDBACK):
                log.ensure_topic(topic, partitions, exact=False)
                log.append_reporting(topic, [])
        except BaseException:
            log.close()
            raise
        self._buffer: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._on_their_way = self._delivered = self._failed = self._told_failed = 0
        self._first_error: BaseException | None = None
        self._hurry = 0  # callers that wait in flush
        self._closing = False
        # Not a daemon: the interpreter waits for it, and it empties the buffer when the main thread has ended.
        self._thread = threading.Thread(target=self._work, name="smes-events")
        self._thread.start()

    def impression(
        self,
        *,
        user: Id,
        item: Id,
        features: Mapping[str, Any] | None = None,
        served: Mapping[str, Any] | None = None,
        request: Id | None = None,
        time_ms: int | None = None,
        impression: Id | None = None,
    ) -> Sent:
        """Send an impression: an item that was shown to a user.

        Args:
            user: Their id.
            item: Its id.
            features: Name of a feature → an id, a list of ids, or a number. What is left out is missing; where all
                features of the user, or of the item, are left out, the trainer reads them from the feature store.
            served: ``arm``, ``version`` and ``scores`` of the answer by which it was shown
                (:meth:`smes_client.answers.Answer.served`).
            request: Which impressions were shown together.
            time_ms: When it was shown, Unix milliseconds; None: now.
            impression: Its unique id; None: a random one.

        Raises:
            ValueError: A field is not what the schema wants; the message names it. Nothing is sent.
            BufferFull: There was no room within ``block_s``. Nothing is sent.
        """
        impression_id = secrets.randbits(63) if impression is None else id_of(impression, "impression")
        value = self._forms.impression(impression_id, user, item, features, request, served, time_ms)
        return self._put(Encoded(IMPRESSIONS, impression_id, value))

    def feedback(self, impression: Id, task: str, value: float = 1, *, time_ms: int | None = None) -> Sent:
        """Send feedback: an outcome of an impression.

        Args:
            impression: The impression's id.
            task: Name of the task.
            value: 0 or 1 of a binary task, 0 … ``max_value`` of a regression.
            time_ms: When it happened, Unix milliseconds; None: now.

        Raises:
            ValueError, BufferFull: As :meth:`impression`.
        """
        impression_id, encoded = self._forms.feedback(impression, task, value, time_ms)
        return self._put(Encoded(FEEDBACK, impression_id, encoded))

    @property
    def counts(self) -> Counts:
        """What became of the events so far."""
        with self._changed:
            return Counts(self._delivered, self._failed, self._waiting)

    def flush(self, timeout_s: float | None = None) -> int:
        """Wait until every event that was taken so far is delivered or has failed.

        Args:
            timeout_s: Longest wait; None: until then, which ``delivery_timeout_s`` bounds for each batch.

        Returns:
            How many events were delivered since the start.

        Raises:
            DeliveryFailed: Some have failed since the last call, or the time is over.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            until = self._delivered + self._failed + self._waiting
            self._hurry += 1
            self._changed.notify_all()
            try:
                while (done := self._delivered + self._failed) < until:
                    left_s = None if deadline_s is None else deadline_s - time.monotonic()
                    if left_s is not None and left_s <= 0:
                        raise DeliveryFailed(f"{until - done} events not acknowledged within {timeout_s:g} s")
                    self._changed.wait(left_s)
            finally:
                self._hurry -= 1
            failed, self._told_failed = self._failed - self._told_failed, self._failed
            if failed:
                first = self._first_error
                raise DeliveryFailed(f"{failed} events not delivered; the first because: {first}") from first
            return self._delivered

    def close(self) -> None:
        """Deliver what is in the buffer, and close the connection; idempotent.

        Raises:
            DeliveryFailed: As :meth:`flush`.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _waiting(self) -> int:
        return len(self._buffer) + self._on_their_way

    def _put(self, event: Encoded) -> Sent:
        delivery: Future[Delivered] = Future()
        with self._changed:
            if self._waiting >= self._buffer_events and not self._closing:
                self._changed.wait_for(lambda: self._waiting < self._buffer_events or self._closing, self._block_s)
            if self._closing:
                raise ValueError("event: the producer was closed")
            if self._waiting >= self._buffer_events:
                what = f"{self._waiting} events wait for the event log"
                raise BufferFull(f"{what}, no room within {self._block_s:g} s (buffer_events, block_s)")
            self._buffer.append(_Waiting(event, delivery, time.monotonic()))
            if len(self._buffer) in (1, self._batch_events):
                self._changed.notify_all()
        return Sent(event.impression_id, delivery)

    def _work(self) -> None:
        """The sending thread."""
        try:
            while batch := self._next_batch():
                for topic in (IMPRESSIONS, FEEDBACK):
                    if events := [each for each in batch if each.event.topic == topic]:
                        self._deliver(topic, events)
        finally:
            if threading.main_thread().is_alive():  # else closing might need threads, which no longer start
                self._event_log.close()
            elif self._failed > self._told_failed:
                _log.error("%d events not delivered at the end of the program", self._failed - self._told_failed)

    def _next_batch(self) -> list[_Waiting]:
        """The next events, when they are enough or the first has waited long enough; none at the end."""
        with self._changed:
            while not self._buffer:
                if self._closing:
                    return []
                self._look(_LOOK_S)
            due_s = self._buffer[0].since_s + self._linger_s
            while len(self._buffer) < self._batch_events and not (self._closing or self._hurry):
                if (left_s := due_s - time.monotonic()) <= 0:
                    break
                self._look(min(left_s, _LOOK_S))
            batch = [self._buffer.popleft() for _ in range(min(len(self._buffer), self._batch_events))]
            self._on_their_way += len(batch)
            return batch

    def _look(self, seconds: float) -> None:
        """Wait for a change so long, and see whether the program is at its end."""
        self._changed.wait(seconds)
        self._closing |= not threading.main_thread().is_alive()

    def _deliver(self, topic: str, events: Sequence[_Waiting]) -> None:
        """Append events of one topic, and report what became of each."""
        try:
            partitions = self._event_log.partitions(topic)
            records, record_of = records_of(
                [each.event for each in events], self._schema, self._codec, partitions, by_request=self._by_request
            )
            offsets = self._event_log.append_reporting(topic, records)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is each event's report
            _log.warning("%d events of topic %s not delivered: %s", len(events), topic, error)
            self._report(events, [error] * len(events))
            return
        reports = [Delivered(topic, records[record].partition, offsets[record]) for record in record_of.tolist()]
        self._report(events, reports)

    def _report(self, events: Sequence[_Waiting], reports: Sequence[Delivered | Exception]) -> None:
        for each, report in zip(events, reports, strict=True):
            if isinstance(report, Exception):
                each.delivery.set_exception(report)
            else:
                each.delivery.set_result(report)
            if self._on_delivery is not None:
                try:
                    self._on_delivery(Sent(each.event.impression_id, each.delivery))
                except Exception:  # noqa: BLE001 - the caller's, and the next event has to be reported too
                    _log.exception("on_delivery raised")
        failed = sum(isinstance(report, Exception) for report in reports)
        with self._changed:
            if failed and self._failed == self._told_failed:
                self._first_error = next(report for report in reports if isinstance(report, Exception))
            self._on_their_way -= len(events)
            self._failed += failed
            self._delivered += len(events) - failed
            self._changed.notify_all()
