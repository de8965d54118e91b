"""Keep freed memory in the process, for the next step or request.

By default glibc returns large blocks to the system as soon as they are freed, and the system clears every page before
it hands it out again. A training step frees and allocates some hundred MB. Clearing those pages took a seventh of a
training step's time and a fifth of a scoring call's (docs/performance.md).
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT = 32 << 20  # Tables and snapshots are larger. They still go back to the system.
_MOST_KEPT = 1 << 30


def keep_freed_memory() -> bool:
    """Let this process keep freed blocks of up to 32 MiB, 1 GiB in total. May be called more than once.

    Returns:
        Whether the setting was made. It exists in glibc only; nothing changes with another C library.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # another C library may not have it
    return mallopt is not None and all(
        mallopt(option, size) == 1
        for option, size in ((_M_MMAP_THRESHOLD, _LARGEST_KEPT), (_M_TRIM_THRESHOLD, _MOST_KEPT))
    )
