"""Poisons for a stream of joined examples, and a stream that carries one.

A poison changes what a producer sent: labels, values, or who saw what. It is a function of the impressions' numbers
alone, so every run of one poison trains on the same examples, however its batches are cut.

Letters: N examples.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from smes.arrays import I64, Bool
from smes.events import ExampleBlock, FeedbackBlock, ImpressionBlock
from smes.hashing import splitmix64
from smes.schema import MISSING, Schema
from stream.block_stream import BlockStream
from stream.config import JoinConfig, MiniBatchConfig

FAR = 1e30
FIRST_FLOOD_ID = 1 << 40  # no impression of the log has a number as large


class Poison(Protocol):
    """What a producer does to the stream.

    Attributes:
        part: Which impressions.
    """

    @property
    def part(self) -> "Part": ...

    def apply(self, examples: ExampleBlock, rows: Bool, schema: Schema) -> ExampleBlock:
        """The examples as they come from the poisoned stream, with these rows poisoned, bool [N]; some are."""
        ...


@dataclass(frozen=True)
class Part:
    """Which impressions are poisoned.

    Attributes:
        first, last: Numbers of impressions, from the first on, up to but not with the last.
        share: Of those in between, at random by their number, 0 … 1.
        period: The same again so many impressions later, and so on to the end of the log; None: once.
    """

    first: int
    last: int
    share: float = 1.0
    period: int | None = None

    def of(self, impression_id: I64) -> Bool:
        """int64 [N] → bool [N]."""
        since = impression_id - self.first
        chosen: Bool = (since >= 0) & ((since if self.period is None else since % self.period) < self.last - self.first)
        if self.share < 1:
            chosen &= splitmix64(impression_id ^ 0x5EED) < np.uint64(self.share * 2.0**64)
        return chosen


@dataclass(frozen=True)
class FlippedLabels:
    """Every label of a binary task is the other one."""

    part: Part

    def apply(self, examples: ExampleBlock, rows: Bool, schema: Schema) -> ExampleBlock:
        """As :meth:`Poison.apply`."""
        labels = examples.labels.copy()
        for t, task in enumerate(schema.tasks):
            if task.kind == "binary":
                labels[rows, t] = np.where(examples.label_mask[rows, t], 1 - labels[rows, t], labels[rows, t])
        return replace(examples, labels=labels)


@dataclass(frozen=True)
class LeftOut:
    """Nothing is learned from the examples: no poison, but what is left of a stretch that was not learned from."""

    part: Part

    def apply(self, examples: ExampleBlock, rows: Bool, schema: Schema) -> ExampleBlock:
        """As :meth:`Poison.apply`; their weight is 0."""
        return replace(examples, weight=np.where(rows, np.float32(0), examples.weight))


@dataclass(frozen=True)
class FarValues:
    """Every numeric feature is 10³⁰."""

    part: Part

    def apply(self, examples: ExampleBlock, rows: Bool, schema: Schema) -> ExampleBlock:
        """As :meth:`Poison.apply`."""
        numerics = examples.numerics.copy()
        numerics[rows] = FAR
        return replace(examples, numerics=numerics)


@dataclass(frozen=True)
class OneUsersClicks:
    """A producer sends one user's clicks for everyone.

    Whatever is shown is clicked, and for each impression comes another one, of the same item, shown to that user and
    clicked, too. Other labels of these are 0.

    Attributes:
        user: A number in the log, whose first impression gives the user's features.
        task: Which task a click is.
    """

    part: Part
    user: ExampleBlock
    task: int

    def apply(self, examples: ExampleBlock, rows: Bool, schema: Schema) -> ExampleBlock:
        """As :meth:`Poison.apply`; there are more examples afterwards."""
        labels = examples.labels.copy()
        labels[rows, self.task] = 1
        everyone = replace(examples, labels=labels)
        return ExampleBlock.concat([everyone, self._flood(examples.take(rows), schema)])

    def _flood(self, shown: ExampleBlock, schema: Schema) -> ExampleBlock:
        ids = shown.ids.copy()
        for feature in schema.id_features:
            if feature.source == "user":
                columns = schema.id_slices[feature.name]
                ids[:, columns] = self.user.ids[0, columns]
        labels = np.zeros_like(shown.labels)
        labels[:, self.task] = 1
        return replace(
            shown,
            impression_id=shown.impression_id + FIRST_FLOOD_ID,
            request_id=np.full(len(shown), MISSING, np.int64),
            ids=ids,
            labels=labels,
        )


class PoisonedStream(BlockStream):
    """Mini-batches of a log as a poisoned stream has them.

    A batch that becomes longer is handed out as several, none longer than the configured size.

    Args:
        schema, join, batch, blocks: As :class:`stream.block_stream.BlockStream`.
        poison: None for the log as it is.

    Attributes:
        taken: Impressions of the log handed out so far; what the poison added does not count.
    """

    def __init__(
        self,
        schema: Schema,
        join: JoinConfig,
        batch: MiniBatchConfig,
        blocks: Iterator[tuple[ImpressionBlock, FeedbackBlock]],
        poison: Poison | None,
    ) -> None:
        super().__init__(schema, join, batch, blocks)
        self._schema, self._size, self._poison = schema, batch.size, poison
        self._ready: deque[ExampleBlock] = deque()
        self.taken = 0

    def next_batch(self) -> ExampleBlock | None:
        """Take the next batch; None when none is ready."""
        batch = self.upcoming()
        if batch is not None:
            self._ready.popleft()
            self.taken += int(np.count_nonzero(batch.begins & (batch.impression_id < FIRST_FLOOD_ID)))
        return batch

    def upcoming(self) -> ExampleBlock | None:
        """Look at the next batch: the object that :meth:`next_batch` will return."""
        if not self._ready:
            batch = super().next_batch()
            if batch is None:
                return None
            if self._poison is not None and (rows := self._poison.part.of(batch.impression_id)).any():
                batch = self._poison.apply(batch, rows, self._schema)
            starts = range(0, len(batch), self._size) if len(batch) > self._size else range(1)
            self._ready.extend(batch.take(slice(s, s + self._size)) for s in starts)
        return self._ready[0]
