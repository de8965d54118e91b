"""Memory that is freed stays with the process, for the next step or request.

glibc hands large blocks back to the system as soon as they are freed, and the system clears every page anew when it is
asked again. A training step frees and asks for some hundred MB: a seventh of its time, and a fifth of a scoring call's,
went into that (docs/performance.md).
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT = 32 << 20  # tables and snapshots are larger: those go back
_MOST_KEPT = 1 << 30  # at the end of the heap


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, in blocks of up to 32 MiB, 1 GiB at most. Idempotent.

    Returns:
        Whether it does: only glibc is told so, other systems stay as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # another C library may have none
    return mallopt is not None and all(
        mallopt(option, size) == 1
        for option, size in ((_M_MMAP_THRESHOLD, _LARGEST_KEPT), (_M_TRIM_THRESHOLD, _MOST_KEPT))
    )
