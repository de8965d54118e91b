"""Arrays that grow in place: address space is reserved once, and the system fills it page by page as it is used.

So a table of gigabytes grows without a copy, and without needing twice its memory while it is copied. Small arrays are
ordinary ones; so are all arrays where the system refuses the reservation (strict accounting of memory, a limit on
address space, not Linux): they grow by doubling, with a copy.
"""

import mmap
import os
import sys
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

SMALL_BYTES = 1 << 20
"""Arrays up to this size are ordinary ones."""

_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python names it from 3.13 on; Linux has one value for it


class ReservedArray:
    """Rows of one type and width, the number of which grows. New rows are zero.

    ``array`` has at least as many rows as were asked for. A view of it stays valid for ever: growth in place leaves it
    as it is, and after a growth by copy it shows the rows as they were then.

    Args:
        dtype: Of the elements.
        columns: Elements of a row; None for one dimension.
        largest_bytes: What to reserve; by default as much as the machine has memory.

    Attributes:
        array: [rows, columns] or [rows]. Ask for it again after :meth:`reserve`.
        in_place: Whether it has reserved address space by now.
    """

    def __init__(self, dtype: DTypeLike, columns: int | None = None, largest_bytes: int | None = None) -> None:
        self._dtype = np.dtype(dtype)
        self._shape = () if columns is None else (columns,)
        self._row_bytes = self._dtype.itemsize * (1 if columns is None else columns)
        self._largest = memory_bytes() if largest_bytes is None else largest_bytes
        self.array: NDArray[Any] = np.zeros((0, *self._shape), self._dtype)
        self.in_place = False

    def reserve(self, rows: int) -> None:
        """Make room for ``rows`` rows in total."""
        have = len(self.array)
        if rows <= have:
            return
        if not self.in_place and rows * self._row_bytes > SMALL_BYTES:
            reserved = _reserved(max(self._largest, 2 * rows * self._row_bytes))
            if reserved is not None:
                room = len(reserved) // self._row_bytes
                whole = np.frombuffer(reserved, np.uint8, room * self._row_bytes)
                self._replace(whole.view(self._dtype).reshape(room, *self._shape))
                self.in_place = True
                return
        self.in_place = False  # more than what was reserved: copied like an ordinary array
        self._replace(np.zeros((max(rows, 2 * have, 16), *self._shape), self._dtype))

    def _replace(self, longer: NDArray[Any]) -> None:
        longer[: len(self.array)] = self.array
        self.array = longer


def _reserved(size: int) -> mmap.mmap | None:
    """Address space of ``size`` bytes, zero where it was never written; None where the system refuses."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        space = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    except (OSError, ValueError, OverflowError):
        return None
    with suppress(OSError):  # a kernel without huge pages
        space.madvise(mmap.MADV_HUGEPAGE)  # a table is read at random: fewer pages, fewer walks through page tables
    return space


def memory_bytes() -> int:
    """How much memory the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
