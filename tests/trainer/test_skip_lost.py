"""Records that were trimmed before they were read: refused by name, and skipped only on demand, with a count."""

import pytest

from smes.errors import PositionOutOfRange
from stream.example_stream import ExampleStream
from stream.log import TopicPartition
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
    assert stream.skip_lost() == {source: 30}
    assert stream.skip_lost() == {}
    while stream.poll(0):
        pass
    ends = {**log.end(IMPRESSIONS), **log.end(FEEDBACK)}
    assert stream.has_reached(ends)
    assert stream.assembler.ledger().impressions == 400 - 30
