"""Bytes that are made while they are read, so that a payload is never in memory whole."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from feature_store.manifest import MAX_CHUNKS
from smes_io.tensor_pieces import Piece


@dataclass(frozen=True, slots=True)
class Payload:
    """Bytes that are made while they are read.

    Attributes:
        total_bytes: How many there are.
        pieces: Makes them, from the beginning, in pieces of any length. A piece is good until the next is asked for.
        num_rows: Rows of the table in it.
    """

    total_bytes: int
    pieces: Callable[[], Iterator[Piece]]
    num_rows: int = 0

    @classmethod
    def of(cls, whole: bytes) -> "Payload":
        """Bytes that are there already."""
        return cls(len(whole), lambda: iter((whole,)))

    def joined(self) -> bytes:
        """All of it."""
        return b"".join(bytes(piece) for piece in self.pieces())


def chunk_sizes(total_bytes: int, chunk_bytes: int, parts: int = 1) -> list[int]:
    """The lengths of the chunks of a payload; longer than ``chunk_bytes`` where there would be too many of them.

    Args:
        total_bytes: Of the payload, or of the part of one of ``parts`` ranks.
        chunk_bytes: As configured.
        parts: How many ranks write a part each.
    """
    size = max(chunk_bytes, -(-total_bytes // (MAX_CHUNKS // parts)))
    return [min(size, total_bytes - start) for start in range(0, total_bytes, size)]


def in_chunks(pieces: Iterable[Piece], size: int) -> Iterator[memoryview]:
    """The same bytes in pieces of this length, the last one shorter. A piece is good until the next is asked for."""
    filling, filled = np.empty(size, np.uint8), 0
    for piece in pieces:
        rest = np.frombuffer(piece, np.uint8)  # NumPy copies without the interpreter's lock
        while len(rest):
            taken = rest[: size - filled]
            filling[filled : filled + len(taken)] = taken
            filled += len(taken)
            rest = rest[len(taken) :]
            if filled == size:
                yield filling.data
                filled = 0
    if filled:
        yield filling[:filled].data
