"""How far the training is behind the end of the event log: asked by a thread and a connection of their own.

An event log that is away makes this thread wait, and nobody else.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from smes.errors import SmesError
from stream.codec.codec import Decoded
from stream.log.event_log import EventLog, Positions, Record, TopicPartition
from stream.topics import EXAMPLES, FEEDBACK, IMPRESSIONS

_logger = logging.getLogger(__name__)
_EVERY_S = 2.0
_READ_S = 0.05
_PATIENCE_S = 5.0  # the client itself tries again for longer


@dataclass(frozen=True, slots=True)
class Behind:
    """How far the reading of a partition is behind its end.

    Attributes:
        records: Records not read yet, counted in offsets. An Arrow record may hold thousands of events.
        seconds: Event time from the next record to read to the newest one; 0 at the end, None where it is not known.
        end: Where the partition ends: the next offset that a record will get.
    """

    records: int
    seconds: float | None
    end: int


@dataclass(frozen=True, slots=True)
class Lag:
    """What was found last.

    Attributes:
        partitions: Partition → how far behind.
        newest_ms: Event time of the newest last record of a partition, Unix milliseconds; None if none is known.
    """

    partitions: dict[TopicPartition, Behind] = field(default_factory=dict)
    newest_ms: int | None = None

    @property
    def records(self) -> int:
        """Of all partitions together."""
        return sum(behind.records for behind in self.partitions.values())

    @property
    def seconds(self) -> float | None:
        """Of the partition that is furthest behind; None where it is not known."""
        known = [behind.seconds for behind in self.partitions.values() if behind.seconds is not None]
        return max(known) if known else None


class LogEnd:
    """Looks every two seconds where the log ends.

    Attributes:
        lag: What was found last; None before the first time.
        failures: Looks that failed.

    Args:
        open_log: Opens a connection that nobody else uses.
        decode: Decodes records of both topics.
        positions: Next record to read of every partition.
        every_s: Seconds between two looks.
        time_of_examples: Newest event time of a record of joined examples, Unix milliseconds; None if it has none.
    """

    def __init__(
        self,
        open_log: Callable[[], EventLog],
        decode: Callable[[Sequence[Record]], Decoded],
        positions: Callable[[], Positions],
        *,
        every_s: float = _EVERY_S,
        time_of_examples: Callable[[Record], int | None] = lambda record: None,
    ) -> None:
        self._time_of_examples = time_of_examples
        self._open_log, self._decode, self._positions, self._every_s = open_log, decode, positions, every_s
        self.lag: Lag | None = None
        self.failures = 0
        self._failure: str | None = None
        self._asked_s: float | None = None  # since when there is no answer
        self._times: dict[tuple[TopicPartition, int], int | None] = {}  # of records that were looked at before
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log-end", daemon=True)

    @property
    def problem(self) -> str | None:
        """Why it is not known where the log ends; None if it is. From any thread."""
        asked_s = self._asked_s
        waited_s = 0.0 if asked_s is None else time.monotonic() - asked_s
        if waited_s > _PATIENCE_S:
            return f"where the event log ends is not known: no answer for {waited_s:.0f} s"
        return self._failure

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop it, and wait for that for a second."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(1.0)

    def _run(self) -> None:
        log: EventLog | None = None
        while not self._stop.is_set():
            try:
                self._asked_s = time.monotonic()
                if log is None:
                    log = self._open_log()
                    log.set_stop(self._stop)
                self.lag = self._look(log)
                self._failure = None
            except SmesError as error:
                self._failed(error)
            except Exception as error:  # whatever a client raises: the next look is in two seconds
                self._failed(error)
                _logger.debug("looking where the event log ends", exc_info=True)
            self._asked_s = None
            self._stop.wait(self._every_s)
        if log is not None:
            log.close()

    def _failed(self, error: Exception) -> None:
        if not self._stop.is_set():
            self.failures += 1
            self._failure = f"where the event log ends is not known: {error}"

    def _look(self, log: EventLog) -> Lag:
        positions, known, self._times = self._positions(), self._times, {}
        topics = sorted({source.topic for source in positions}) or [FEEDBACK, IMPRESSIONS]
        ends = {source: end for topic in topics for source, end in log.end(topic).items()}
        behind, newest = {}, []
        for source, end in ends.items():
            position = min(positions.get(source, end), end)
            last_ms = self._time(log, known, source, end - 1) if end > 0 else None
            if last_ms is not None:
                newest.append(last_ms)
            seconds: float | None = 0.0
            if position < end:
                next_ms = self._time(log, known, source, position)
                seconds = None if last_ms is None or next_ms is None else max(0.0, (last_ms - next_ms) / 1000)
            behind[source] = Behind(end - position, seconds, end)
        return Lag(behind, max(newest, default=None))

    def _time(
        self, log: EventLog, known: dict[tuple[TopicPartition, int], int | None], source: TopicPartition, at: int
    ) -> int | None:
        """Newest event time of the record at an offset or after it; None if it cannot be read or decoded."""
        if (source, at) not in known:
            time_ms = None
            with suppress(SmesError):  # trimmed since, or none of ours
                records = log.read({source: at}, max_records=1, timeout_s=_READ_S).records[:1]
                if source.topic == EXAMPLES:
                    time_ms = self._time_of_examples(records[0]) if records else None
                else:
                    decoded = self._decode(records)
                    times = [*decoded.impressions.event_time_ms.tolist(), *decoded.feedback.event_time_ms.tolist()]
                    time_ms = max(times, default=None)
            known[source, at] = time_ms
        self._times[source, at] = known[source, at]
        return known[source, at]
