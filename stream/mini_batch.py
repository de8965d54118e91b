"""Mini-batches bounded by size and by age.

Where a batch ends depends on the examples alone (they come ordered by event time), never on when they came, so a
restarted trainer cuts the same batches.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smes.events import ExampleBlock
from smes.schema import Schema


@dataclass(frozen=True)
class MiniBatchConfig:
    """Bounds of a mini-batch.

    Attributes:
        size: Most examples in a batch.
        max_age_s: Most event time between its first and last example, seconds; a batch that the stream has left behind
            by this much is handed out however small, so that sparse traffic does not wait for a full one. It is event
            time: live traffic wants seconds; a log replayed a thousand times as fast wants the hour of the default,
            or its batches are tiny.
    """

    size: int = 256
    max_age_s: float = 3600.0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size {self.size}, expected at least 1")
        if not self.max_age_s > 0:
            raise ValueError(f"max_age_s {self.max_age_s}, expected more than 0 seconds")


class MiniBatcher:
    """Cuts the joined stream into batches; the half-filled one is its state."""

    def __init__(self, schema: Schema, config: MiniBatchConfig) -> None:
        self._config = config
        self._max_age_ms = round(config.max_age_s * 1000)
        self._max_window_ms = schema.max_window_ms
        self._pending: list[ExampleBlock] = []
        self._empty = ExampleBlock.empty(schema)

    def __len__(self) -> int:
        """Examples waiting in the half-filled batch."""
        return sum(len(block) for block in self._pending)

    def push(self, examples: ExampleBlock, watermark_ms: int) -> list[ExampleBlock]:
        """Take what the join emitted, in its order, and give the batches that are complete.

        Args:
            examples: As :meth:`stream.join.Joiner.push` returned them.
            watermark_ms: The join's watermark after that push: every example yet to come is younger than
                ``watermark_ms - max_window_ms``.
        """
        if len(examples):
            self._pending.append(examples)
        if not self._pending:
            return []
        if len(self) < self._config.size and not self._is_old(watermark_ms):
            return []
        pending = ExampleBlock.concat(self._pending)
        batches, start = [], 0
        while start < len(pending):
            # Ordered by event time, so the age bound is a prefix too.
            until_ms = pending.event_time_ms[start] + self._max_age_ms
            aged = int(np.searchsorted(pending.event_time_ms, until_ms, side="right"))
            stop = min(start + self._config.size, aged)
            complete = stop - start == self._config.size or aged < len(pending)
            if not complete and until_ms >= watermark_ms - self._max_window_ms:
                break
            batches.append(pending.take(slice(start, stop)))
            start = stop
        self._pending = [pending.take(slice(start, None))] if start < len(pending) else []
        return batches

    def flush(self) -> list[ExampleBlock]:
        """The stream is over: what is left, as one last batch (none if nothing is left)."""
        pending, self._pending = self._pending, []
        return [ExampleBlock.concat(pending)] if pending else []

    def _is_old(self, watermark_ms: int) -> bool:
        first, last = self._pending[0].event_time_ms[0], self._pending[-1].event_time_ms[-1]
        return bool(first + self._max_age_ms < max(last, watermark_ms - self._max_window_ms))

    def state(self) -> dict[str, NDArray[Any]]:
        """Arrays from which :meth:`load_state` goes on."""
        return ExampleBlock.concat([self._empty, *self._pending]).arrays()

    def load_state(self, state: dict[str, NDArray[Any]]) -> None:
        """The inverse of :meth:`state`."""
        block = ExampleBlock(**state)
        self._pending = [block] if len(block) else []
