"""The ranks that train one model together, and what they tell each other.

A rank is one process, or one thread of a test. All ranks call the same methods in the same order; each call waits for
the others. With one rank nothing is sent.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # what runs no ranks imports no torch
    from torch import Tensor


class World(Protocol):
    """The ranks of one training, as one of them sees them. For one thread of each rank.

    Attributes:
        rank: Which rank this is, 0 ≤ rank < size.
        size: N, how many ranks there are, ≥ 1.
    """

    rank: int
    size: int

    def sum(self, tensors: "Sequence[Tensor]") -> None:
        """Replace each tensor by its sum over all ranks, in place.

        Every rank gets the same bits, and the same ranks with the same tensors get them again.

        Args:
            tensors: Of the same shapes and types on every rank, each contiguous.
        """
        ...

    def exchange(self, parts: "Sequence[Tensor]") -> "list[Tensor]":
        """Send a part to each rank, and return the parts that were sent to this one, in the order of the ranks.

        Args:
            parts: N tensors of one type, which may differ in their first dimension only, on every rank alike.
        """
        ...

    def trade(self, values: "Tensor", going: Sequence[int], coming: Sequence[int]) -> "Tensor":
        """Do as :meth:`exchange` where every rank knows what comes: one message, and nothing is put together twice.

        Args:
            values: The parts, one behind the other.
            going: How long the part of each rank is, in the first dimension.
            coming: How long the part from each rank is.

        Returns:
            The parts that were sent to this rank, one behind the other. It may be ``values`` itself.
        """
        ...

    def gather(self, values: "Tensor") -> "list[Tensor]":
        """Give every rank what all ranks have, in the order of the ranks. They may differ in their first dimension."""
        ...

    def broadcast(self, message: bytes) -> bytes:
        """Give every rank the message of rank 0. Those of the others are not used."""
        ...

    def collect(self, message: bytes) -> list[bytes]:
        """Give rank 0 the messages of all ranks, in their order; other ranks get an empty list."""
        ...

    def wait_for_all(self) -> None:
        """Return when all ranks have called this."""
        ...


class Alone:
    """The world of one rank."""

    rank, size = 0, 1

    def sum(self, tensors: "Sequence[Tensor]") -> None:
        """The tensors are their own sums."""

    def exchange(self, parts: "Sequence[Tensor]") -> "list[Tensor]":
        return list(parts)

    def trade(self, values: "Tensor", going: Sequence[int], coming: Sequence[int]) -> "Tensor":
        return values

    def gather(self, values: "Tensor") -> "list[Tensor]":
        return [values]

    def broadcast(self, message: bytes) -> bytes:
        return message

    def collect(self, message: bytes) -> list[bytes]:
        return [message]

    def wait_for_all(self) -> None:
        """There is nobody to wait for."""


ALONE = Alone()
