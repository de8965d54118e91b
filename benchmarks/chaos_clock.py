"""Run ``smes`` with a clock that this benchmark moves: ``python chaos_clock.py FILE ARGUMENT …``.

``FILE`` holds seconds to add to the wall clock. It is read again every 0.1 s. The monotonic clock is left alone, as a
clock that an operator or NTP sets leaves it alone. Every module of the process sees it. libfaketime was tried instead:
under it a client of Kafka read nothing, or the monotonic clock jumped, too.
"""

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

from smes_cli.__main__ import main

_READ_EVERY_S = 0.1


def move_clock(file: Path) -> None:
    """Replace ``time.time`` and ``time.time_ns`` of this process."""
    true_ns: Callable[[], int] = time.time_ns
    offset_ns, read_s = 0, -1.0

    def time_ns() -> int:
        nonlocal offset_ns, read_s
        if time.monotonic() - read_s > _READ_EVERY_S:
            read_s = time.monotonic()
            with contextlib.suppress(OSError, ValueError):  # it is being written
                offset_ns = round(float(file.read_text()) * 1e9)
        return true_ns() + offset_ns

    time.time_ns = time_ns
    time.time = lambda: time_ns() / 1e9


if __name__ == "__main__":
    move_clock(Path(sys.argv[1]))
    del sys.argv[1]
    main()
