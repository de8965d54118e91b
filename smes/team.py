"""Run a compiled loop with several threads: those that torch has for its own operators.

torch's builds for Linux bring GNU's OpenMP. Its team of threads for the calling thread runs the loop, so there are no
threads beside torch's, and no wait for Python's lock. Where there is no such library, the calling thread does the work
alone. Imports no torch.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol


class CompiledLoop(Protocol):
    """What ``numba.cfunc("void(int64)")`` makes. It may run in several threads at the same time."""

    @property
    def address(self) -> int:
        """Of the machine code."""


def run(loop: CompiledLoop, arguments: Sequence[int], threads: int) -> None:
    """Run a loop in some threads at the same time, and wait until all have ended.

    Args:
        loop: Called in each thread with the address of its arguments. The first, a counter, comes before those given
            here and is 0: the threads share the work by it.
        arguments: int64 numbers, such as addresses of tensors' data. The caller keeps what they point to.
        threads: How many, ≥ 1.

    Raises:
        MemoryError: No thread had room for what the loop keeps of its own, so that none took a number of the counter.
    """
    block = (ctypes.c_int64 * (len(arguments) + 1))(0, *arguments)
    together = _parallel() if threads > 1 else None
    if together is None:
        _alone(loop.address)(ctypes.addressof(block))
    else:
        together(loop.address, ctypes.addressof(block), threads, 0)
    if block[0] == 0:  # numba prints what a loop raises, and goes on
        raise MemoryError("a compiled loop had no room for its numbers, expected some kilobytes for each thread")


@cache
def _alone(address: int) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


@cache
def _parallel() -> Any:
    """``GOMP_parallel(function, data, threads, flags)``; None where it is not loaded."""
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    function.restype, function.argtypes = None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    return function
