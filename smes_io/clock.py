"""The wall clock that adapters stamp arrivals with, as one injectable function."""

import time


def wall_clock_ms() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000
