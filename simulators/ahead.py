"""The next item of an iterator is made while the present one is used."""

from collections.abc import Iterator
from concurrent.futures import Executor, Future
from typing import Generic, Self, TypeVar

_T = TypeVar("_T")


class Ahead(Generic[_T]):
    """Iterates over other items, each of which is made on another thread while the one before it is used.

    At most one item is there that was not asked for yet: that bounds the memory.
    An error in the making of an item is raised where the item is asked for.

    Args:
        items: Used by the other thread alone, from the first item until :meth:`wait` has returned.
        executor: Runs the other thread.
    """

    def __init__(self, items: Iterator[_T], executor: Executor) -> None:
        self._items, self._executor = items, executor
        self._coming: Future[tuple[_T] | None] | None = None

    def _ask(self) -> "Future[tuple[_T] | None]":
        return self._executor.submit(lambda: next(((item,) for item in self._items), None))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> _T:
        found = (self._coming or self._ask()).result()
        if found is None:
            raise StopIteration
        self._coming = self._ask()
        return found[0]

    def wait(self) -> None:
        """Wait until no item is being made. What went wrong with it does not matter any more."""
        if self._coming is not None:
            self._coming.exception()
