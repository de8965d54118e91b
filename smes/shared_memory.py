"""Memory that several processes have at the same time: one writes, the others map it and can only read.

It has no name and lies in no folder: a process passes its descriptor to those that may see it, and it is gone when the
last of them is. The system fills it page by page as it is written, so that a table of gigabytes can grow in place.
Linux only (``memfd_create``).
"""

import fcntl
import mmap
import os
import sys
import weakref
from contextlib import suppress
from itertools import count

import numpy as np
from numpy.typing import DTypeLike, NDArray

from smes.reserved import ReservedArray, memory_bytes

_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python names it from 3.13 on; Linux has one value for it
_ADD_SEALS, _SEAL_SHRINK, _SEAL_GROW, _SEAL_FUTURE_WRITE = 1033, 0x2, 0x4, 0x10
_numbers = count(1)

Bytes = NDArray[np.uint8]


class SharedBytes:
    """Zeros that this process writes to, and that others may map.

    Args:
        size: How many bytes, at least 1. Only those that were written take memory.

    Attributes:
        number: No other of this process has it.
        size: As given.
        descriptor: Of the memory. Whoever has it can map it, but not to write: the system sees to that from Linux 5.1
            on. Closed with this object.
        array: The bytes, uint8 [size]. A view of it stays valid for ever.

    Raises:
        MemoryError: The system has no such memory, or does not give it.
    """

    def __init__(self, size: int) -> None:
        self.number, self.size = next(_numbers), size
        if not sys.platform.startswith("linux"):
            raise MemoryError(f"memory for several processes: {sys.platform}, expected Linux")
        try:
            self.descriptor = os.memfd_create("smes", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            weakref.finalize(self, os.close, self.descriptor)
            os.ftruncate(self.descriptor, size)
            space = mmap.mmap(self.descriptor, size, flags=mmap.MAP_SHARED | _NORESERVE)
        except (OSError, ValueError, OverflowError) as error:
            raise MemoryError(f"memory for several processes: {size:,} bytes: {error}") from error
        with suppress(OSError):  # a kernel without this
            fcntl.fcntl(self.descriptor, _ADD_SEALS, _SEAL_SHRINK | _SEAL_GROW | _SEAL_FUTURE_WRITE)
        _in_huge_pages(space)
        self.array: Bytes = np.frombuffer(space, np.uint8)


class SharedArray(ReservedArray):
    """A :class:`smes.reserved.ReservedArray` in shared memory. It never moves, so it grows up to what was reserved.

    Attributes:
        memory: Where it lies, from the first byte on.
    """

    def __init__(self, dtype: DTypeLike, columns: int | None = None, largest_bytes: int | None = None) -> None:
        super().__init__(dtype, columns, largest_bytes)
        rows = max(1, (memory_bytes() if largest_bytes is None else largest_bytes) // self._row_bytes)
        self.memory = SharedBytes(rows * self._row_bytes)
        self.array = self.memory.array.view(self._dtype).reshape(rows, *self._shape)
        self.in_place = True

    def reserve(self, rows: int) -> None:
        """Make room for ``rows`` rows in total.

        Raises:
            MemoryError: They are more than were reserved.
        """
        if rows > len(self.array):
            raise MemoryError(f"memory for several processes: {rows:,} rows, expected at most {len(self.array):,}")


def mapped(descriptor: int, size: int) -> Bytes:
    """The bytes of another process's memory, uint8 [size], to read. The descriptor may be closed afterwards.

    Raises:
        MemoryError: The system refuses.
    """
    try:
        space = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | _NORESERVE, prot=mmap.PROT_READ)
    except (OSError, ValueError, OverflowError) as error:
        raise MemoryError(f"memory of another process: {size:,} bytes: {error}") from error
    _in_huge_pages(space)
    return np.frombuffer(space, np.uint8)


def _in_huge_pages(space: mmap.mmap) -> None:
    """Ask for large pages, where the system has them for shared memory (``shmem_enabled``: advise)."""
    with suppress(OSError):
        space.madvise(mmap.MADV_HUGEPAGE)
