"""How far a training is behind the log's end, in records and in event time, and what is said while nobody knows."""

import json

from smes.errors import EventLogUnavailable
from stream.codec.codec import decode
from stream.log.event_log import EventLog, Record, TopicPartition
from stream.topics import FEEDBACK, IMPRESSIONS
from tests.running import until
from tests.trainer.small_world import SCHEMA, fill, open_log
from trainer.log_end import LogEnd


def test_lag_is_counted_from_the_next_record_to_the_last_and_an_outage_is_named() -> None:
    log = open_log()
    fill(log, 200)
    ends = {**log.end(IMPRESSIONS), **log.end(FEEDBACK)}
    halfway = {source: end // 2 for source, end in ends.items()}
    done = TopicPartition(FEEDBACK, 1)
    positions = halfway | {done: ends[done]}
    times = {
        source: [json.loads(r.value)["event_time_ms"] for r in _all_of(log, source, end)]
        for source, end in ends.items()
    }
    tries = []

    def opened() -> EventLog:
        tries.append(1)
        if len(tries) == 1:
            raise EventLogUnavailable("log: no answer")
        return log

    problems: list[str | None] = []
    end = LogEnd(opened, lambda records: decode(records, SCHEMA), lambda: positions, every_s=0.05)
    end.start()

    def is_known() -> bool:
        problems.append(end.problem)
        return end.lag is not None

    until(is_known)
    end.stop()

    assert "where the event log ends is not known: log: no answer" in problems
    assert (end.problem, end.failures) == (None, 1)
    lag = end.lag
    assert lag is not None
    for source, behind in lag.partitions.items():
        last, at = times[source][-1], positions[source]
        assert behind.records == ends[source] - at
        assert behind.seconds == (0 if at == ends[source] else max(0, last - times[source][at]) / 1000)
    assert lag.records == sum(ends.values()) - sum(positions.values()) > 100
    assert lag.newest_ms == max(of_source[-1] for of_source in times.values())
    assert lag.seconds is not None
    assert 0.5 < lag.seconds < 6, "of two seconds of impressions, and feedback up to four seconds later"


def _all_of(log: EventLog, source: TopicPartition, end: int) -> list[Record]:
    return log.read({source: 0}, max_records=end, timeout_s=0).records
