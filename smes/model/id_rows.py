"""Which row of the table each id has: new ids get rows, ids that are not seen any more give them back.

Letters: B and N instances, W id columns, K distinct keys of a batch, U distinct rows of a batch, R rows of the table.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from smes.arrays import F32, I64, Arrays, Bool, prefixed, under
from smes.id_map import ABSENT, IdMap
from smes.model.admission import Sightings
from smes.model.id_rows_kernels import distinct
from smes.model.ids import IdKeys
from smes.model.row_ages import RowAges
from smes.model.row_keys import KeysView, RowKeys
from smes.model.rows_config import RowCounts, RowsConfig
from smes.model.shards import Routes, owner_of
from smes.reserved import ReservedArray
from smes.schema import Schema
from smes.world import ALONE, World

UNKNOWN = -1
"""In place of the vocabulary of a row of which it is not known: one that every table has, or a loaded one whose id was
not seen yet."""
_NO_ROWS: I64 = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class BatchRows:
    """The rows that a batch reads; of several ranks, the rows of this one that the batches of all ranks read.

    Attributes:
        rows_U: int64, the distinct rows, in order of appearance.
        cells_BW: int64, for each id the place of its row in ``rows_U``; with ``routes``, among those that come.
        born: int64, those rows that got a new id with this batch.
        keep_U: float32, what the accumulators of each row keep (:meth:`smes.model.table.RecordTable.update`), or None.
        rate_U: float32, a factor on the learning rate of each row, or None.
        routes: Which rows travel between ranks; None where there is one.
    """

    rows_U: I64
    cells_BW: I64
    born: I64
    keep_U: F32 | None
    rate_U: F32 | None
    routes: Routes | None = None


class IdRows:
    """Rows by id. Not thread-safe, except for views of the keys.

    Rows that were given back are used again first, the last one before the others.

    Args:
        schema: The id, bag and sequence features of its inputs give the columns and the vocabularies.
        config: Which ids get a row, and when a row is given back.
        half_life_s: See :attr:`smes.model.config.OptimizerConfig.accumulator_half_life_s`.
        frequency_power: See :attr:`smes.model.config.OptimizerConfig.frequency_power`.
        world: The ranks that share the rows. This one has rows for the keys that :func:`owner_of` gives it.

    Attributes:
        ids: Makes the keys.

    Raises:
        ValueError: ``config`` has rules for a vocabulary that the schema does not have.
    """

    def __init__(
        self,
        schema: Schema,
        config: RowsConfig | None = None,
        *,
        half_life_s: float | None = None,
        frequency_power: float = 0.0,
        world: World = ALONE,
    ) -> None:
        config = config or RowsConfig()
        self._world = world
        names = list(dict.fromkeys(f.vocabulary_name for f in schema.inputs.id_features))
        rules = config.rules(names)
        self.ids = IdKeys(schema, [rule.shared_rows for rule in rules])
        self._admit_after_V = np.array([rule.admit_after for rule in rules], np.int64)
        self._sightings = Sightings(config.counted_sightings) if (self._admit_after_V > 1).any() else None
        self._ages: RowAges | None = None
        if config.gives_rows_back or half_life_s is not None or frequency_power:
            self._ages = RowAges(config, names, half_life_s=half_life_s, frequency_power=frequency_power, world=world)
        self._vocabulary_R = ReservedArray(np.int16)  # of each row's id, UNKNOWN where it was never seen
        self._any_unknown = False
        self._map = IdMap()
        self._keys = RowKeys(lambda: self._map.key_by_row)
        self._removed: list[I64] | None = None
        self._born = self._expired = self._replaced = self._turned_away = 0
        self._required_rows = self._adopt(self._own_required())
        if self._ages is not None:
            self._ages.born_required(self._required_rows)

    def __len__(self) -> int:
        """How many rows have an id, those that every table has included."""
        return len(self._map)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the map from ids to rows takes."""
        return self._map.nbytes

    @property
    def counts(self) -> RowCounts:
        """The rows of ids, those that every table has not included."""
        in_use = len(self) - len(self._required_rows)
        return RowCounts(in_use, self._born, self._expired, self._replaced, self._turned_away)

    @property
    def num_rows(self) -> int:
        """How many rows the table needs: used and free ones."""
        return self._keys.num_rows

    @property
    def required(self) -> I64:
        """The rows of :attr:`IdKeys.required`; of several ranks, of those keys that are this one's."""
        return self._required_rows

    @property
    def used(self) -> Bool:
        """Which rows have an id; a view. bool [R]."""
        return self._keys.used

    def keys(self, rows_N: I64) -> I64:
        """The keys of rows that have an id. int64 [N] → int64 [N]."""
        return self._map.key_by_row[rows_N]

    @property
    def turns_away(self) -> bool:
        """Whether ids may be left without a row."""
        return self._sightings is not None or (self._ages is not None and self._ages.has_budgets)

    def owns(self, keys_N: I64) -> Bool:
        """Which of the keys are this rank's. bool [N]."""
        alone = self._world.size == 1
        mine: Bool = np.ones(len(keys_N), np.bool_) if alone else owner_of(keys_N, self._world.size) == self._world.rank
        return mine

    def assign(self, ids_BW: I64, event_time_ms: int) -> BatchRows:
        """Find the rows of a batch that will be trained on, where there is one rank. New ids get rows, old ones give
        theirs back.

        Args:
            ids_BW: int64 [B, W].
            event_time_ms: The latest event time of the batch, Unix milliseconds.
        """
        keys_K, cells, times_K, first_K = distinct(self.ids.own(ids_BW))
        vocabulary = self.ids.vocabulary_W[first_K % ids_BW.shape[1]]
        rows_K, born = self.give(keys_K, times_K, vocabulary, event_time_ms)
        others = np.flatnonzero(rows_K == ABSENT)
        if len(others):
            rows_K[others] = self._required_rows[self.ids.required_place(keys_K[others], vocabulary[others])]
            rows_K, place_K, _, _ = distinct(rows_K)
            cells = place_K[cells]
        keep_U, rate_U = self.touch(rows_K)
        return BatchRows(rows_K, cells.reshape(ids_BW.shape), born, keep_U, rate_U)

    def give(self, keys_K: I64, times_K: I64, vocabulary: I64, event_time_ms: int) -> tuple[I64, I64]:
        """Find the rows of keys; new ids get rows, old ones give theirs back. :meth:`touch` has to follow.

        Args:
            keys_K: int64 [K], distinct keys of a batch.
            times_K: int64 [K], how often each of them occurs in it.
            vocabulary: int64 [K], their vocabularies.
            event_time_ms: The latest event time of the batch, Unix milliseconds.

        Returns:
            (int64 [K], their rows, ``ABSENT`` for those that get none; int64, the rows that got a new id).
        """
        if self._ages is not None:
            self._expired += self._give_back(self._ages.advance(event_time_ms))
        rows_K = self._map.find(keys_K)
        absent = np.flatnonzero(rows_K == ABSENT)
        if self._any_unknown:
            seen = rows_K != ABSENT
            self._vocabulary_R.array[rows_K[seen]] = vocabulary[seen]
            self._vocabulary_R.array[self._required_rows] = UNKNOWN
        admitted = self._admitted(keys_K[absent], times_K[absent], vocabulary[absent])
        if self._ages is not None:
            known = np.flatnonzero(rows_K != ABSENT)
            self._ages.know(rows_K[known], vocabulary[known])
            given_back, fits = self._ages.make_room(vocabulary[absent[admitted]], rows_K[known])
            self._replaced += self._give_back(given_back)
            self._turned_away += int(np.count_nonzero(~fits))
            admitted[admitted] = fits
        new = absent[admitted]
        rows_K[new] = born = self._adopt(keys_K[new])
        self._vocabulary_R.array[born] = vocabulary[new]
        self._born += len(born)
        if self._ages is not None:
            self._ages.born(born, vocabulary[new])
        return rows_K, born

    def touch(self, rows_U: I64) -> tuple[F32 | None, F32 | None]:
        """Distinct rows are read by a batch; see :meth:`RowAges.touch`."""
        return (None, None) if self._ages is None else self._ages.touch(rows_U)

    def rows_of(self, keys_N: I64) -> I64:
        """The rows that keys have, ``ABSENT`` for those without. int64 [N] → int64 [N]."""
        return self._map.find(keys_N)

    def find(self, ids_BW: I64) -> I64:
        """The row that each id reads now; nothing changes. int64 [B, W] → int64 [B, W]."""
        return find_rows(self.ids, ids_BW, self._map.find)

    def has(self, keys_N: I64) -> Bool:
        """Which keys have a row. bool [N]."""
        present: Bool = self._map.find(keys_N) != ABSENT
        return present

    def adopt(self, keys_N: I64) -> I64:
        """Give keys of unknown vocabularies rows; those that have one keep it. int64 [N] → int64 [N]."""
        known = self.num_rows
        rows = self._adopt(keys_N)
        born = rows[rows >= known]
        self._any_unknown = True
        self._born += len(born)
        if self._ages is not None:
            self._ages.born_unknown(born)
        return rows

    def note_removed(self) -> None:
        """Keep, from now on, the keys whose rows are given back, for :meth:`take_removed`."""
        self._removed = []

    def take_removed(self) -> I64:
        """The keys that have no row now and had one since the last call. int64 [N], distinct."""
        removed: I64 = np.unique(np.concatenate([_NO_ROWS, *(self._removed or [])]))
        self.note_removed()
        gone: I64 = removed[self._map.find(removed) == ABSENT]
        return gone

    def view(self, num_rows: int | None = None) -> KeysView:
        """The keys as they are now; of the first ``num_rows`` rows for a view that is restored."""
        return self._keys.view(num_rows)

    def find_as_of(self, view: KeysView, ids_NW: I64, columns_W: I64 | None = None) -> I64:
        """The row that each id, of these columns, read when a view was opened. int64 [N, W] → int64 [N, W]."""
        return find_rows(self.ids, ids_NW, lambda keys: view.find(keys, self._map.find), columns_W)

    def state(self) -> Arrays:
        """What :meth:`load_state` continues from, beside the keys; copies."""
        counts = np.array([self._born, self._expired, self._replaced, self._turned_away])
        vocabulary = self._vocabulary_R.array[: self.num_rows].copy()
        state: Arrays = {"free": self._map.free_rows.copy(), "counts": counts, "vocabulary": vocabulary}
        if self._ages is not None:
            state |= prefixed("ages.", self._ages.state())
        if self._sightings is not None:
            state |= prefixed("sightings.", self._sightings.state())
        return state

    def load_state(self, keys_R: I64, state: Arrays) -> None:
        """Continue from the keys of a view and the :meth:`state` of the same moment, in an instance without ids.

        Args:
            keys_R: int64 [R], the keys by row; of free rows any.
            state: The rest.

        Raises:
            ValueError: The rows that every table has are missing: other rules of ``shared_rows``, or another schema. Or
                rows are another rank's.
        """
        used = np.ones(len(keys_R), np.bool_)
        used[state["free"]] = False
        rows = np.flatnonzero(used)
        if others := int(np.count_nonzero(~self.owns(keys_R[rows]))):
            rank = f"rank {self._world.rank} of {self._world.size}"
            raise ValueError(f"rows of the id table: {others} are another rank's, expected those of {rank}")
        self._map = IdMap.from_state(
            {"ids": keys_R[rows], "rows": rows, "free": state["free"], "next_row": np.array([len(keys_R)])}
        )
        self._born, self._expired, self._replaced, self._turned_away = (int(n) for n in state["counts"])
        self._keys = RowKeys(lambda: self._map.key_by_row)
        self._keys.born(np.arange(len(keys_R)))
        self._keys.give_back(state["free"])
        self._required_rows = self._map.find(self._own_required())
        if (self._required_rows == ABSENT).any():
            raise ValueError(
                "rows of the id table: the default or shared rows of a vocabulary are missing; expected the schema and "
                "the shared_rows that the state was made with"
            )
        self._vocabulary_R.reserve(len(keys_R))
        self._vocabulary_R.array[: len(keys_R)] = state["vocabulary"]
        unknown = int((state["vocabulary"][rows] == UNKNOWN).sum())
        self._any_unknown = unknown > len(self._required_rows)
        if self._sightings is not None and "sightings.counters" in state:
            self._sightings.load_state(under("sightings.", state))
        if self._ages is not None and "ages.clock" in state:
            self._ages.load_state(under("ages.", state))
        elif self._ages is not None:
            self._ages.born_unknown(np.setdiff1d(rows, self._required_rows))
            self._ages.born_required(self._required_rows)

    def _admitted(self, keys_N: I64, times_N: I64, vocabulary_N: I64) -> Bool:
        """Which of the ids that have no row get one, unless no room is left. bool [N]."""
        if self._sightings is None:
            return np.ones(len(keys_N), np.bool_)
        counted = self._admit_after_V[vocabulary_N] > 1
        admitted = ~counted
        counts = self._sightings.add(keys_N[counted], times_N[counted])
        admitted[counted] = counts >= self._admit_after_V[vocabulary_N[counted]]
        return admitted

    def _own_required(self) -> I64:
        return self.ids.required[self.owns(self.ids.required)]

    def _adopt(self, keys_N: I64) -> I64:
        known = self.num_rows
        rows = self._map.insert(keys_N)
        self._keys.born(rows)
        self._vocabulary_R.reserve(self.num_rows)
        self._vocabulary_R.array[rows[rows >= known]] = UNKNOWN
        return rows

    def _give_back(self, rows_N: I64) -> int:
        """Take ids away from rows; how many."""
        if len(rows_N):
            keys = self.keys(rows_N)
            self._keys.give_back(rows_N)
            self._map.remove(keys)
            if self._removed is not None:
                self._removed.append(keys)
        return len(rows_N)


def find_rows(ids: IdKeys, ids_NW: I64, find: Callable[[I64], I64], columns_W: I64 | None = None) -> I64:
    """The row that each id reads: its own, else its vocabulary's shared or default one. int64 [N, W] → int64 [N, W].

    Args:
        ids: Makes the keys.
        ids_NW: The ids.
        find: Finds the rows of keys, ``ABSENT`` for those without.
        columns_W: Which columns these are; None: all.
    """
    keys = ids.own(ids_NW, columns_W)
    rows = find(keys)
    absent = np.flatnonzero(rows == ABSENT)
    if len(absent):
        rows[absent] = find(ids.shared(keys[absent], absent, columns_W))
    return rows.reshape(ids_NW.shape)
