"""What the training loop needs of a stream."""

from typing import Protocol

from smes.arrays import Arrays
from smes.events import ExampleBlock
from stream.batch_queue import BatchTimes
from stream.join.ledgers import StreamLedger
from stream.log.event_log import Positions


class Stream(Protocol):
    """Where batches come from: :class:`stream.example_stream.ExampleStream`, or blocks in memory for a backtest."""

    def poll(self, timeout_s: float) -> int:
        """Read once; the number of events read."""

    def next_batch(self) -> ExampleBlock | None:
        """Take the next complete mini-batch out of the queue; None when none is ready."""

    def taken_times(self) -> BatchTimes | None:
        """When the examples of the batch taken last came, in seconds of ``time.monotonic``; None if unknown."""

    def upcoming(self) -> ExampleBlock | None:
        """Look at the next complete mini-batch without taking it: the object that ``next_batch`` will return."""

    def flush(self) -> None:
        """End the stream: everything that waits becomes batches."""

    def ledger(self) -> StreamLedger:
        """Where every event read so far is now."""

    def end(self) -> Positions:
        """Where the log ends now."""

    def has_reached(self, end: Positions) -> bool:
        """Whether everything before ``end`` has been read."""

    @property
    def join_nbytes(self) -> int:
        """Bytes of memory that the join takes."""

    def positions_by_topic(self) -> dict[str, dict[str, int]]:
        """Topic → partition → next record to read."""

    def state(self) -> Arrays:
        """Arrays from which ``load_state`` continues."""

    def load_state(self, state: Arrays) -> None:
        """The inverse of ``state``."""

    def saved(self, state: Arrays) -> None:
        """Note that a state is on disk."""
