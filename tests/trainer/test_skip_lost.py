"""Records that were trimmed before they were read: refused by name, and skipped only on demand, with a count."""

import pytest

from smes.errors import LogReplaced, PositionOutOfRange
from stream.example_stream import ExampleStream
from stream.log.event_log import TopicPartition
from stream.topics import FEEDBACK, IMPRESSIONS
from tests.trainer.small_world import fill, make_trainer, open_log


def test_lost_records_are_refused_then_skipped_on_demand() -> None:
    log = open_log()
    fill(log, 400)
    stream = make_trainer(log, None).stream
    assert isinstance(stream, ExampleStream)
    source = TopicPartition(IMPRESSIONS, 1)
    log.truncate(source, 30)
    with pytest.raises(PositionOutOfRange, match=IMPRESSIONS):
        stream.poll(0)
    [(moved, skipped)] = stream.skip_lost().items()
    assert (moved, skipped.before, skipped.now) == (source, 0, 30)
    assert str(skipped).startswith("impressions partition 1: going on at 30, not 0: the 30 records between")
    assert stream.skip_lost() == {}
    while stream.poll(0):
        pass
    ends = {**log.end(IMPRESSIONS), **log.end(FEEDBACK)}
    assert stream.has_reached(ends)
    assert stream.ledger().impressions == 400 - 30


def test_a_log_that_came_back_empty_is_read_from_its_beginning() -> None:
    log = open_log()
    fill(log, 400)
    before = make_trainer(log, None).stream
    while before.poll(0):
        pass
    for topic in (IMPRESSIONS, FEEDBACK):
        log.make_anew(topic)
    stream = make_trainer(log, None).stream
    assert isinstance(stream, ExampleStream)
    stream.load_state(before.state())
    with pytest.raises(LogReplaced):
        stream.poll(0)
    assert {skipped.now for skipped in stream.skip_lost().values()} == {0}
    assert stream.poll(0) == 0
