"""Mini-batches from blocks in memory, for backtests: the same join and batcher as from an event log."""

from collections.abc import Iterator

import numpy as np

from smes.arrays import Arrays
from smes.events import ExampleBlock, FeedbackBlock, ImpressionBlock
from smes.schema import Schema
from stream.join.joiner import JoinConfig
from stream.join.ledgers import StreamLedger
from stream.log.event_log import Positions
from stream.mini_batches import Assembler, MiniBatchConfig
from stream.partition_state import state_name

_POSITION = state_name("blocks", 0, "position")


class BlockStream:
    """Mini-batches from pairs of blocks in merged event-time order, all of partition 0.

    Args:
        schema: Features and tasks.
        join: How long to wait and to remember.
        batch: Bounds of a mini-batch.
        blocks: Impressions and feedback; each poll takes one pair. After the last pair nothing waits any more.
    """

    def __init__(
        self,
        schema: Schema,
        join: JoinConfig,
        batch: MiniBatchConfig,
        blocks: Iterator[tuple[ImpressionBlock, FeedbackBlock]],
    ) -> None:
        self.assembler = Assembler(schema, join, batch, partitions=1)
        self.ended = False
        self._blocks = blocks
        self._read = 0

    def poll(self, timeout_s: float) -> int:
        """Take one pair of blocks; the number of events in it, 0 at the end."""
        pair = next(self._blocks, None)
        if pair is None:
            if not self.ended:
                self.assembler.flush()
            self.ended = True
            return 0
        self.assembler.push(*pair)
        self._read += 1
        return len(pair[0]) + len(pair[1])

    def next_batch(self) -> ExampleBlock | None:
        """Take the next complete mini-batch out of the queue; None when none is ready."""
        return self.assembler.next_batch()

    def taken_times(self) -> None:
        """Nothing: what was read from memory came at no time."""

    def upcoming(self) -> ExampleBlock | None:
        """Look at the next complete mini-batch without taking it: the object that :meth:`next_batch` will return."""
        return self.assembler.upcoming()

    def flush(self) -> None:
        """Close the windows that are open. After the last pair that has happened already."""
        self.assembler.flush()

    def ledger(self) -> StreamLedger:
        """Where every event read so far is now."""
        return self.assembler.ledger()

    def end(self) -> Positions:
        """No positions: blocks are read until there are no more."""
        return {}

    def has_reached(self, end: Positions) -> bool:
        """Whether the last pair was taken."""
        return self.ended

    def positions_by_topic(self) -> dict[str, dict[str, int]]:
        """How many pairs were taken."""
        return {"blocks": {"0": self._read}}

    def state(self) -> Arrays:
        """The assembler's state and how many pairs were taken."""
        return {**self.assembler.state(), _POSITION: np.array([self._read])}

    def load_state(self, state: Arrays) -> None:
        """The inverse of :meth:`state`: skips the pairs that were taken then."""
        self.assembler.load_state(state)
        read = int(state[_POSITION][0])
        for _ in range(read - self._read):
            next(self._blocks, None)
        self._read = read

    def saved(self, state: Arrays) -> None:
        """Nothing: no batch depends on a clock."""
