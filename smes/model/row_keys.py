"""Which rows of a table have an id, and the keys that rows had at earlier moments.

Letters: R rows, N keys or rows.
"""

from collections.abc import Callable

import numpy as np

from smes.arrays import I64, Bool
from smes.id_map import ABSENT, IdMap
from smes.model.turns import Turns
from smes.reserved import ReservedArray


class RowKeys:
    """Which rows have an id. The keys themselves are the id map's (:attr:`smes.id_map.IdMap.key_by_row`).

    Not thread-safe, except for its views.

    Args:
        keys: Gives the key that each row has, or had last. int64 [R].
    """

    def __init__(self, keys: Callable[[], I64]) -> None:
        self.num_rows = 0
        self._keys = keys
        self._used = ReservedArray(np.bool_)
        self._turns = Turns()
        self._views: list[KeysView] = []

    @property
    def used(self) -> Bool:
        """Which rows have an id; a view. bool [R]."""
        used: Bool = self._used.array[: self.num_rows]
        return used

    def born(self, rows_N: I64) -> None:
        """Rows have got ids. Until this is called, views count them as rows without an id."""
        self._change(rows_N, used=True)

    def give_back(self, rows_N: I64) -> None:
        """Rows are about to lose their ids. Call it before their keys change."""
        self._change(rows_N, used=False)

    def view(self, num_rows: int | None = None) -> "KeysView":
        """The keys as they are now; of the first ``num_rows`` rows for a view that is restored."""
        view = KeysView(self._keys, self._used, self.num_rows if num_rows is None else num_rows, self._turns)
        self._views.append(view)
        return view

    def _change(self, rows_N: I64, *, used: bool) -> None:
        if len(rows_N) == 0:
            return
        with self._turns.turn():
            self._views = [view for view in self._views if view.open]
            for view in self._views:
                view.before_change(rows_N)
            self.num_rows = max(self.num_rows, int(rows_N.max()) + 1)
            self._used.reserve(self.num_rows)
            self._used.array[rows_N] = used


class KeysView:
    """The keys of rows at one moment. :meth:`block` may be called from any one thread.

    Args:
        keys: As for :class:`RowKeys`.
        used: Which rows have an id, an array that goes on changing.
        num_rows: Rows at that moment.
        turns: Held while ``used`` changes.
    """

    def __init__(self, keys: Callable[[], I64], used: ReservedArray, num_rows: int, turns: Turns) -> None:
        self.num_rows = num_rows
        self.open = True
        self._live_keys, self._live_used, self._turns = keys, used, turns
        self._place = np.zeros(num_rows, np.int32)  # 0: unchanged since; else 1 + place in the log
        self._rows, self._keys, self._used = ReservedArray(np.int64), ReservedArray(np.int64), ReservedArray(np.bool_)
        self._length = self._indexed = 0
        self._gone = IdMap()  # key that a row had → its place among ``_gone_rows``
        self._gone_rows = ReservedArray(np.int64)

    def before_change(self, rows_N: I64) -> None:
        """Keep the keys of rows that are about to change. For the owner of the keys, who holds the lock."""
        rows = rows_N[rows_N < self.num_rows]
        rows = rows[self._place[rows] == 0]
        self._keep(rows, self._live_keys()[rows], self._live_used.array[rows])

    def block(self, start: int, stop: int) -> tuple[I64, Bool]:
        """Keys of the rows ``start`` … ``stop`` - 1, int64 (0 without an id), and which of them had an id, bool."""
        with self._turns.turn():
            keys, used = self._live_keys()[start:stop].copy(), self._live_used.array[start:stop].copy()
            place = self._place[start:stop]
            changed = np.flatnonzero(place)
            keys[changed] = self._keys.array[place[changed] - 1]
            used[changed] = self._used.array[place[changed] - 1]
        keys[~used] = 0
        return keys, used

    def find(self, keys_N: I64, live: Callable[[I64], I64]) -> I64:
        """The row that each key had, ``ABSENT`` for those that had none. int64 [N] → int64 [N].

        Call it from the thread that changes the keys.

        Args:
            keys_N: The keys.
            live: Finds the rows that keys have now.
        """
        self._index()
        rows = live(keys_N)
        known = (rows != ABSENT) & (rows < self.num_rows)
        known[known] = self._place[rows[known]] == 0
        rows[~known] = self._gone.find(keys_N[~known])
        gone = ~known & (rows != ABSENT)
        rows[gone] = self._gone_rows.array[rows[gone]]
        return rows

    def log(self) -> tuple[I64, I64, Bool]:
        """What changed since, for :meth:`restore`. Copies nothing, and later changes do not show.

        Returns:
            (rows, their keys at that moment, whether they had an id).
        """
        stop = self._length
        return self._rows.array[:stop], self._keys.array[:stop], self._used.array[:stop]

    def restore(self, rows: I64, keys: I64, used: Bool) -> None:
        """Begin with what an earlier view kept."""
        self._keep(rows, keys, used)

    def close(self) -> None:
        """Keep nothing any more. May be called twice, and from any thread."""
        with self._turns.turn():
            self.open = False
            self._place = np.zeros(0, np.int32)
            self._rows, self._keys, self._used = (ReservedArray(t) for t in (np.int64, np.int64, np.bool_))
            self._gone, self._gone_rows = IdMap(), ReservedArray(np.int64)

    def _keep(self, rows: I64, keys: I64, used: Bool) -> None:
        stop = self._length + len(rows)
        for array, kept in ((self._rows, rows), (self._keys, keys), (self._used, used)):
            array.reserve(stop)
            array.array[self._length : stop] = kept
        self._place[rows] = np.arange(self._length + 1, stop + 1)
        self._length = stop

    def _index(self) -> None:
        """Make the keys in the log findable."""
        log = slice(self._indexed, self._length)
        had_id = self._used.array[log]
        places = self._gone.insert(self._keys.array[log][had_id])
        self._gone_rows.reserve(len(self._gone))
        self._gone_rows.array[places] = self._rows.array[log][had_id]
        self._indexed = self._length
