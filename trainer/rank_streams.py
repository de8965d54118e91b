"""A rank's stream, of which reports and metrics see the counts of all ranks."""

from collections.abc import Callable

from smes.arrays import Arrays
from smes.events import ExampleBlock
from stream.batch_queue import BatchTimes
from stream.join.ledgers import StreamLedger
from stream.log.event_log import Positions
from trainer.rank_figures import RankFigures
from trainer.stream import Stream


class StreamOfAll:
    """A :class:`trainer.stream.Stream` whose ledger, positions and memory are those of all ranks together.

    Args:
        own: This rank's stream.
        figures: What all ranks had counted when they last told each other; None: only what this one has counted.
    """

    def __init__(self, own: Stream, figures: Callable[[], RankFigures | None]) -> None:
        self._own, self._figures = own, figures

    def poll(self, timeout_s: float) -> int:
        return self._own.poll(timeout_s)

    def next_batch(self) -> ExampleBlock | None:
        return self._own.next_batch()

    def taken_times(self) -> BatchTimes | None:
        return self._own.taken_times()

    def upcoming(self) -> ExampleBlock | None:
        return self._own.upcoming()

    def flush(self) -> None:
        self._own.flush()

    def ledger(self) -> StreamLedger:
        """Of all ranks."""
        figures = self._figures()
        return self._own.ledger() if figures is None else figures.ledger

    def end(self) -> Positions:
        return self._own.end()

    def has_reached(self, end: Positions) -> bool:
        return self._own.has_reached(end)

    @property
    def join_nbytes(self) -> int:
        """Of all ranks."""
        figures = self._figures()
        return self._own.join_nbytes if figures is None else figures.join_nbytes

    def positions_by_topic(self) -> dict[str, dict[str, int]]:
        """Of all ranks."""
        figures = self._figures()
        return self._own.positions_by_topic() if figures is None else figures.positions

    def state(self) -> Arrays:
        return self._own.state()

    def load_state(self, state: Arrays) -> None:
        self._own.load_state(state)

    def saved(self, state: Arrays) -> None:
        self._own.saved(state)
