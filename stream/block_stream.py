"""Mini-batches out of blocks in memory, with the same join and batcher as from an event log: for backtests."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smes.events import ExampleBlock, FeedbackBlock, ImpressionBlock
from smes.schema import Schema
from stream.join.joiner import JoinConfig
from stream.join.ledgers import StreamLedger
from stream.log.event_log import Positions
from stream.mini_batches import Assembler, MiniBatchConfig


class BlockStream:
    """Pairs of blocks, in merged event-time order, all of partition 0.

    Args:
        schema: Features and tasks.
        join: Waiting and remembering.
        batch: Bounds of a mini-batch.
        blocks: Impressions and feedback; consumed one pair a poll. After the last, everything that waits is handed out.
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

    def upcoming(self) -> ExampleBlock | None:
        """Look at the next complete mini-batch without taking it: the object that :meth:`next_batch` will return."""
        return self.assembler.upcoming()

    def ledger(self) -> StreamLedger:
        """Where every event read so far is now."""
        return self.assembler.ledger()

    def end(self) -> Positions:
        """Nowhere: blocks are read until there are no more."""
        return {}

    def has_reached(self, end: Positions) -> bool:
        """Whether the last pair was taken."""
        return self.ended

    @property
    def exhausted(self) -> bool:
        """Nothing left to read or to train on."""
        return self.ended and not self.assembler.ready

    def positions_by_topic(self) -> dict[str, dict[str, int]]:
        """How many pairs were taken."""
        return {"blocks": {"0": self._read}}

    def state(self) -> dict[str, NDArray[Any]]:
        """The assembler's state and how many pairs were taken."""
        return {**self.assembler.state(), "read": np.array([self._read])}

    def load_state(self, state: dict[str, NDArray[Any]]) -> None:
        """The inverse of :meth:`state`: skips the pairs that were taken then."""
        self.assembler.load_state(state)
        for _ in range(int(state["read"][0]) - self._read):
            next(self._blocks, None)
        self._read = int(state["read"][0])
