"""Mini-batches from blocks in memory, for backtests: the same join and batcher as from an event log."""

from collections.abc import Iterator

import numpy as np

from smes.arrays import Arrays
from smes.events import ExampleBlock, FeedbackBlock, ImpressionBlock
from smes.schema import Schema
from stream.config import JoinConfig, MiniBatchConfig
from stream.join.ledgers import StreamLedger
from stream.join.watermarks import START_OF_TIME
from stream.log.event_log import Positions
from stream.mini_batches import Assembler
from stream.priming import BLOCKS, NEWEST, OWN_IDS, POSITION


class BlockStream:
    """Mini-batches from pairs of blocks in merged event-time order, all of partition 0.

    Args:
        schema: Features and tasks.
        join: How long to wait and to remember.
        batch: Bounds of a mini-batch.
        blocks: Impressions and feedback; each poll takes one pair. After the last pair nothing waits any more.
        own_ids: Whether impression ids are those of live events, and not numbers of rows.
        stays_open: Whether what waits after the last pair goes on waiting, for a live stream to go on from
            (:mod:`stream.priming`).
    """

    def __init__(
        self,
        schema: Schema,
        join: JoinConfig,
        batch: MiniBatchConfig,
        blocks: Iterator[tuple[ImpressionBlock, FeedbackBlock]],
        *,
        own_ids: bool = False,
        stays_open: bool = False,
    ) -> None:
        self.assembler = Assembler(schema, join, batch, partitions=1)
        self.ended = False
        self._blocks = blocks
        self._read, self._newest_ms = 0, START_OF_TIME
        self._own_ids, self._stays_open = own_ids, stays_open

    def poll(self, timeout_s: float) -> int:
        """Take one pair of blocks; the number of events in it, 0 at the end."""
        pair = next(self._blocks, None)
        if pair is None:
            if not self.ended and not self._stays_open:
                self.assembler.flush()
            self.ended = True
            return 0
        self.assembler.push(*pair)
        self._read += 1
        if len(pair[0]):
            self._newest_ms = max(self._newest_ms, int(pair[0].event_time_ms.max()))
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
        """Close the windows that are open. After the last pair that has happened already, unless they stay open."""
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

    @property
    def join_nbytes(self) -> int:
        """Bytes of memory that the join takes."""
        return self.assembler.join_nbytes

    def positions_by_topic(self) -> dict[str, dict[str, int]]:
        """How many pairs were taken."""
        return {BLOCKS: {"0": self._read}}

    def state(self) -> Arrays:
        """The assembler's state, how many pairs were taken, and what :mod:`stream.priming` asks of the log."""
        own = {POSITION: [self._read], NEWEST: [self._newest_ms], OWN_IDS: [self._own_ids]}
        return {**self.assembler.state(), **{name: np.array(value, np.int64) for name, value in own.items()}}

    def load_state(self, state: Arrays) -> None:
        """The inverse of :meth:`state`: skips the pairs that were taken then."""
        self.assembler.load_state(state)
        self._newest_ms = int(state[NEWEST][0])
        read = int(state[POSITION][0])
        for _ in range(read - self._read):
            next(self._blocks, None)
        self._read = read

    def saved(self, state: Arrays) -> None:
        """Nothing: no batch depends on a clock."""
