"""The newest examples that the publish gate judges by, in bounded memory.

Letters: N examples, T tasks.
"""

import numpy as np

from smes.arrays import F32, I64, Arrays, Bool


class SampledStretch:
    """The newest examples of a sample of the stream, each with the scores of two models that had not seen its labels.

    Attributes:
        size: How many are kept at most.
        total: How many were added so far; an example's number is what ``total`` was before it.

    Args:
        size: As above.
        num_tasks: T.
    """

    def __init__(self, size: int, num_tasks: int) -> None:
        self.size, self.total = size, 0
        shape = (0, num_tasks)
        self._columns: Arrays = {
            "user": np.zeros(0, np.int64),
            "odd": np.zeros(0, np.bool_),
            "labels": np.zeros(shape, np.float32),
            "mask": np.zeros(shape, np.bool_),
            "served": np.zeros(shape, np.float32),
            "live": np.zeros(shape, np.float32),
        }
        self._parts: list[Arrays] = []
        self._pending = 0

    def add(self, *, user: I64, odd: Bool, labels: F32, mask: Bool, served: F32, live: F32) -> None:
        """Add examples, oldest first.

        Args:
            user: int64 [N].
            odd: bool [N], whether a numeric feature lies far out of its range.
            labels, mask: [N, T].
            served: float32 [N, T], scores of the version in service.
            live: float32 [N, T], scores of the weights that are trained, just before their step.
        """
        part: Arrays = {"user": user, "odd": odd, "labels": labels, "mask": mask, "served": served, "live": live}
        self._parts.append({name: array.copy() for name, array in part.items()})
        self.total += len(user)
        self._pending += len(user)
        if self._pending >= self.size:
            self._merge()

    def since(self, number: int) -> "Examples":
        """The examples that are kept, from a number on."""
        self._merge()
        kept = len(self._columns["user"])
        first = min(max(number - (self.total - kept), 0), kept)
        return Examples(**{name: column[first:] for name, column in self._columns.items()})

    def _merge(self) -> None:
        if self._parts:
            parts = [self._columns, *self._parts]
            self._columns = {
                name: np.concatenate([part[name] for part in parts])[-self.size :] for name in self._columns
            }
            self._parts, self._pending = [], 0

    def state(self) -> Arrays:
        """Arrays from which :meth:`load_state` goes on."""
        self._merge()
        return {**self._columns, "total": np.array([self.total])}

    def load_state(self, state: Arrays) -> None:
        """The inverse of :meth:`state`."""
        self._columns = {name: state[name][-self.size :].copy() for name in self._columns}
        self._parts, self._pending = [], 0
        self.total = int(state["total"][0])


class Examples:
    """Some examples of a :class:`SampledStretch`, oldest first; its arguments are the columns. ``len`` is N."""

    def __init__(self, *, user: I64, odd: Bool, labels: F32, mask: Bool, served: F32, live: F32) -> None:
        self.user, self.odd, self.labels, self.mask = user, odd, labels, mask
        self.served, self.live = served, live

    def __len__(self) -> int:
        return len(self.user)
