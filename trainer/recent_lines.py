"""The newest lines of a run's metrics over time, kept in memory for whoever asks a running trainer."""

import json
import threading
from collections import deque
from collections.abc import Iterable
from typing import Any

MOST_LINES, _MOST_CHARACTERS = 2000, 16 * 2**20


class RecentLines:
    """Keeps the newest 2,000 lines of one run, and 16 MiB of them at most. Thread-safe.

    Args:
        before: Lines that the run has written before, oldest first.
    """

    def __init__(self, before: Iterable[dict[str, Any]] = ()) -> None:
        self._lock = threading.Lock()
        self._lines: deque[tuple[int, str]] = deque()
        self._characters = 0
        for line in before:
            self.add(line)

    def add(self, line: dict[str, Any]) -> None:
        """Keep a line, which comes after all others."""
        text = json.dumps(line, separators=(",", ":"))
        with self._lock:
            self._lines.append((line["stretch"], text))
            self._characters += len(text)
            while len(self._lines) > MOST_LINES or (self._characters > _MOST_CHARACTERS and len(self._lines) > 1):
                self._characters -= len(self._lines.popleft()[1])

    def text(self, after: int | None = None, last: int | None = None) -> str:
        """JSON: ``lines``, oldest first; ``next``, what to give as ``after`` next time; ``first``, the oldest one kept.

        Args:
            after: Number of a stretch: only lines of later ones.
            last: Only so many of the newest, ≥ 1.
        """
        with self._lock:
            lines = list(self._lines)
        first = lines[0][0] if lines else None
        end = lines[-1][0] if lines else after
        if after is not None:
            lines = [line for line in lines if line[0] > after]
        if last is not None:
            lines = lines[-last:]
        marks = json.dumps({"next": end, "first": first})
        return f'{{"lines": [{", ".join(text for _, text in lines)}], {marks[1:]}'
