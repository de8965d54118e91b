"""Where batches end, and the queue that a trainer takes them from. No log, no clock, no join.

Where a batch ends depends on the examples alone, unless the caller ends it because of its clock
(:meth:`BatchQueue.end`) or says where it ended before a restart (:meth:`BatchQueue.repeat`).
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from smes.arrays import F64, Arrays
from smes.events import CLOSING, ExampleBlock
from smes.schema import Schema
from stream.config import MiniBatchConfig
from stream.partition_state import OTHER_RANKS, load_rows, save_rows

_END_OF_TIME = int(np.iinfo(np.int64).max)


@dataclass(frozen=True, slots=True)
class BatchTimes:
    """When the examples of a batch came so far, in seconds of the clock of :meth:`Assembler.push`. In no state.

    Attributes:
        joined_s: float64 [N], when each example came out of the join; of those to train on.
        batched_s: When the batch ended.
    """

    joined_s: F64
    batched_s: float


class MiniBatcher:
    """Cuts the joined stream into batches; its state is the half-filled one, and how many examples came before it.

    Attributes:
        ended: Examples in the batches that have ended.
        ends: Values of ``ended`` at which batches ended before a restart, in order: they end there again.

    Args:
        schema: Features and tasks.
        config: Bounds of a mini-batch.
    """

    def __init__(self, schema: Schema, config: MiniBatchConfig) -> None:
        self._config = config
        self._max_age_ms = round(config.max_age_s * 1000)
        self._empty = ExampleBlock.empty(schema)
        self._pending: list[ExampleBlock] = []
        self.ended = 0
        self.ends: deque[int] = deque()

    def __len__(self) -> int:
        """Examples in the half-filled batch."""
        return sum(len(block) for block in self._pending)

    @property
    def pending(self) -> ExampleBlock:
        """The half-filled batch."""
        return ExampleBlock.concat([self._empty, *self._pending])

    @pending.setter
    def pending(self, examples: ExampleBlock) -> None:
        self._pending = [examples] if len(examples) else []

    def push(self, examples: ExampleBlock, watermark_ms: int) -> list[ExampleBlock]:
        """Take what the join emitted, in its order, and return the batches that are complete.

        Args:
            examples: As :meth:`stream.join.joiner.Joiner.push` returned them.
            watermark_ms: The join's watermark after that push: no example yet to come is due before it.
        """
        if len(examples):
            self._pending.append(examples)
        if not self._pending:
            return []
        if len(self) < min(self._config.size, self._to_next_end(0)) and not self._is_old(watermark_ms):
            return []
        pending = ExampleBlock.concat(self._pending)
        closings = np.concatenate([[0], np.cumsum(pending.kind == CLOSING)])  # before each row, and in all
        to_train_on = np.arange(len(closings)) - closings
        batches, start = [], 0
        while start < len(pending):
            # Ordered by the times at which they were due, so the age bound is a prefix too.
            until_ms = pending.due_ms[start] + self._max_age_ms
            aged = int(np.searchsorted(pending.due_ms, until_ms, side="right"))
            full = min(int(np.searchsorted(c, c[start] + self._config.size)) for c in (to_train_on, closings))
            full = min(full, start + self._to_next_end(start))
            stop = min(full, aged)
            complete = stop == full or aged < len(pending)
            if not complete and until_ms >= watermark_ms:
                break
            batches.append(pending.take(slice(start, stop)))
            start = stop
        self._pending = [pending.take(slice(start, None))] if start < len(pending) else []
        self.ended += start
        return batches

    def flush(self) -> list[ExampleBlock]:
        """End the half-filled batch as it is; none if it is empty."""
        self.ended += len(self)
        pending, self._pending = self._pending, []
        return [ExampleBlock.concat(pending)] if pending else []

    def _to_next_end(self, start: int) -> int:
        """How many examples after the first ``start`` of the half-filled batch the next end to repeat lies."""
        while self.ends and self.ends[0] <= self.ended + start:
            self.ends.popleft()
        return self.ends[0] - self.ended - start if self.ends else 2 * self._config.size

    def _is_old(self, watermark_ms: int) -> bool:
        first, last = self._pending[0].due_ms[0], self._pending[-1].due_ms[-1]
        return bool(first + self._max_age_ms < max(last, watermark_ms))


class BatchQueue:
    """A mini-batcher, and the batches that are ready; the queue belongs to the state.

    Attributes:
        taken_times: Times of the batch that was taken last; None before the first.

    Args:
        batcher: Says where batches end.
    """

    def __init__(self, batcher: MiniBatcher) -> None:
        self._batcher = batcher
        self._ready: deque[ExampleBlock] = deque()
        self._times: deque[BatchTimes] = deque()  # of the ready batches
        self._joined: deque[tuple[int, float]] = deque()  # examples of the half-filled batch, and when they came
        self.taken_times: BatchTimes | None = None

    @property
    def ended(self) -> int:
        """How many examples were in the batches that have ended, since the history began; part of the state."""
        return self._batcher.ended

    @property
    def taken(self) -> int:
        """How many examples were in the batches that were taken out of the queue, since the history began."""
        return self.ended - sum(map(len, self._ready))

    @property
    def oldest_s(self) -> float | None:
        """Since when the first example of the half-filled batch has waited; None if there is none."""
        return self._joined[0][1] if self._joined else None

    @property
    def is_repeating(self) -> bool:
        """Whether batches still end where they ended before a restart."""
        return bool(self._batcher.ends)

    @property
    def num_impressions(self) -> int:
        """Impressions in the half-filled batch and in those that are ready."""
        return sum(block.num_impressions for block in (self._batcher.pending, *self._ready))

    @property
    def newest_due_ms(self) -> int | None:
        """When the last example of the half-filled batch was due, Unix milliseconds; None if there is none."""
        pending = self._batcher.pending
        return int(pending.due_ms[-1]) if len(pending) else None

    def repeat(self, ends: Sequence[int]) -> None:
        """End the next batches where they ended before a restart: at these values of :attr:`ended`, in order."""
        self._batcher.ends = deque(ends)

    def push(self, examples: ExampleBlock, watermark_ms: int, now_s: float) -> None:
        """Take examples (see :meth:`MiniBatcher.push`), which came at ``now_s``; complete batches join the queue."""
        if len(examples):
            self._joined.append((len(examples), now_s))
        self._queue(self._batcher.push(examples, watermark_ms), now_s)

    def end(self, now_s: float) -> None:
        """End the half-filled batch as it is; it joins the queue."""
        self._queue(self._batcher.flush(), now_s)

    def take(self) -> ExampleBlock | None:
        """Take the next complete batch out of the queue; None when none is ready."""
        if not self._ready:
            return None
        self.taken_times = self._times.popleft()
        return self._ready.popleft()

    def upcoming(self) -> ExampleBlock | None:
        """Look at the next complete batch without taking it: the object that :meth:`take` will return."""
        return self._ready[0] if self._ready else None

    def state(self, topic: str, partitions: Iterable[int]) -> Arrays:
        """Arrays from which :meth:`load_state` goes on; examples are saved with their partitions of a topic."""
        queued = ExampleBlock.concat([*self._ready, self._batcher.pending]).arrays()
        queued["order"] = np.arange(len(queued["partition"]))
        sizes = np.array([len(batch) for batch in self._ready], np.int64)
        ended = np.array([self._batcher.ended], np.int64)
        return {"ready_sizes": sizes, "ended": ended} | save_rows(topic, "queued", queued, partitions)

    def load_state(self, topic: str, state: Arrays, now_s: float) -> None:
        """The inverse of :meth:`state`; what waits has waited since ``now_s``.

        Of a state of other ranks (:mod:`stream.rank_shares`) all examples are made into batches anew: those that come
        next may be due earlier.
        """
        columns = load_rows(topic, "queued", state)
        order = np.argsort(columns.pop("order"))
        queued, start = ExampleBlock(**columns).take(order), 0
        self._ready.clear()
        self._times.clear()
        self._joined = deque([(len(queued), now_s)] if len(queued) else [])
        for size in state["ready_sizes"].tolist():
            self._queue([queued.take(slice(start, start + size))], now_s)
            start += size
        self._batcher.pending = queued.take(slice(start, None))
        self._batcher.ended, self._batcher.ends = ended_in(state), deque()
        if OTHER_RANKS in state:
            self._queue(self._batcher.push(queued.take(slice(0, 0)), _END_OF_TIME), now_s)

    def _queue(self, batches: Sequence[ExampleBlock], now_s: float) -> None:
        for batch in batches:
            self._ready.append(batch)
            joined_s = self._take_joined(len(batch))
            self._times.append(BatchTimes(joined_s[batch.kind != CLOSING], now_s))

    def _take_joined(self, examples: int) -> F64:
        """When the first ones of the half-filled batch came; they are in a batch now."""
        counts, times = [], []
        while examples:
            count, joined_s = self._joined.popleft()
            if count > examples:
                self._joined.appendleft((count - examples, joined_s))
            counts.append(min(count, examples))
            times.append(joined_s)
            examples -= counts[-1]
        return np.repeat(np.array(times, np.float64), counts)


def ended_in(state: Arrays) -> int:
    """:attr:`BatchQueue.ended` of a state."""
    return int(state["ended"][0])
