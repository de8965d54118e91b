"""The join as a stream of turns: what each read made due, as one block; and the same once more after a restart."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from smes.events import ExampleBlock
from smes.schema import Schema
from stream.batch_queue import MiniBatcher
from stream.config import StreamConfig
from stream.dead_letters import DeadLetterWriter
from stream.example_stream import ExampleStream
from stream.log.event_log import EventLog, Fetch, Positions, TopicPartition


class _WholePushes(MiniBatcher):
    """Every push is a batch, however large."""

    def push(self, examples: ExampleBlock, watermark_ms: int) -> list[ExampleBlock]:
        """What the join emitted, as it came."""
        self.ended += len(examples)
        return [examples] if len(examples) else []


class TurnStream(ExampleStream):
    """An event log, joined: read after read.

    Attributes:
        until: While these are set, reading stops exactly there, and no partition counts as idle.

    Args:
        schema, config, log, dead_letters: As :class:`stream.example_stream.ExampleStream`.
        others: Its further arguments.
    """

    def __init__(
        self, schema: Schema, config: StreamConfig, log: EventLog, dead_letters: DeadLetterWriter, **others: Any
    ) -> None:
        super().__init__(schema, config, log, dead_letters, batcher=_WholePushes(schema, config.batch), **others)
        self.until: Positions | None = None

    @property
    def watermark_ms(self) -> int:
        """Event time that the join has passed, Unix milliseconds."""
        return self.assembler.watermark_ms

    @property
    def is_ahead(self) -> bool:
        """See :attr:`stream.join.joiner.Joiner.is_ahead`."""
        return self.assembler.is_ahead

    def emitted(self) -> list[ExampleBlock]:
        """What became due since this was called last, in order."""
        blocks = []
        while (block := self.next_batch()) is not None:
            blocks.append(block)
        return blocks

    def advance_to(self, watermark_ms: int) -> None:
        """See :meth:`stream.join.joiner.Joiner.advance_to`."""
        self.assembler.advance_to(watermark_ms)

    @property
    def has_reached_until(self) -> bool:
        """Whether everything before :attr:`until` has been read."""
        return self.until is None or self.has_reached(self.until)

    def _read(self, timeout_s: float) -> Fetch:
        if self.until is None:
            return super()._read(timeout_s)
        until, here = self.until, self.positions
        at = {source: here[source] for source, end in until.items() if here[source] < end}
        if not at:
            return Fetch([], dict(here), frozenset())
        return _before(self._read_at(at, timeout_s), until)

    def _idle(self, news: set[TopicPartition], now_s: float) -> list[TopicPartition]:
        idle = super()._idle(news, now_s)
        return idle if self.until is None else []


def positions_of(topic: str, positions: Iterable[int]) -> Positions:
    """Positions by partition from a list of them."""
    return {TopicPartition(topic, p): position for p, position in enumerate(positions)}


def _before(fetch: Fetch, until: Mapping[TopicPartition, int]) -> Fetch:
    """A fetch without what lies at ``until`` or after it."""

    def is_before(topic: str, partition: int, offset: int) -> bool:
        return offset < until[TopicPartition(topic, partition)]

    return replace(
        fetch,
        records=[r for r in fetch.records if is_before(r.topic, r.partition, r.offset)],
        positions={source: min(position, until[source]) for source, position in fetch.positions.items()},
        gaps={source: count for source, count in fetch.gaps.items() if fetch.positions[source] <= until[source]},
        unreadable=[r for r in fetch.unreadable if is_before(r.topic, r.partition, r.offset)],
    )
