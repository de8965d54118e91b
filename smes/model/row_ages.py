"""When the id of each row was last seen, and which rows are given back for it.

Times are seconds of event time. The clock is the latest event time of all batches so far: it never goes back.

Letters: R rows, N and U rows of a batch, V vocabularies.
"""

from collections.abc import Sequence
from math import ceil

import numpy as np

from smes.arrays import F32, I64, Arrays, Bool, prefixed, under
from smes.model.id_rows_kernels import Seconds, Vocabularies, not_among, not_seen_since, oldest
from smes.model.rows_config import RowsConfig
from smes.reserved import ReservedArray
from smes.world import ALONE, World

_LATEST_S = 2**32 - 1
_CHECKS = 64  # so many times within the shortest time of expiry
_SHARE = 32  # a search finds this part of a budget at once
_NOBODY = -1  # the vocabulary of a row that is free, or that no id has


class RowAges:
    """Last sighting and vocabulary of each row, and how many rows each budget has left.

    The row whose id was seen least recently goes first: to a second, and of one second the one with the lowest number.
    Rows of the present batch and of the one before stay: a device may still have to train them.

    A row that is loaded without its age counts as seen when the first batch comes; one that is loaded without its
    vocabulary follows the rules for all until its id is seen.

    Args:
        config: The rules.
        vocabularies: The schema's, in order.
        half_life_s: See :attr:`smes.model.config.OptimizerConfig.accumulator_half_life_s`.
        frequency_power: See :attr:`smes.model.config.OptimizerConfig.frequency_power`.
        world: The ranks that share the rows, and each budget. All of them call :meth:`make_room` together.
    """

    def __init__(
        self,
        config: RowsConfig,
        vocabularies: Sequence[str],
        *,
        half_life_s: float | None = None,
        frequency_power: float = 0.0,
        world: World = ALONE,
    ) -> None:
        self._world = world
        self._unknown = len(vocabularies)  # the vocabulary of a row whose own one is not known
        expiry = [rule.expire_after_s for rule in (*config.rules(vocabularies), config.common)]
        self._expire_s = np.array([np.inf if after is None else ceil(after) for after in expiry])
        self._check_s = max(1, int(self._expire_s.min() / _CHECKS)) if np.isfinite(self._expire_s).any() else _LATEST_S
        self._pools = []
        for n, (members, budget) in enumerate(config.pools(vocabularies)):
            is_common = n == 0 and config.budget is not None
            self._pools.append(_Pool([*members, self._unknown] if is_common else members, len(expiry), budget))
        self._half_life_s, self._power = half_life_s, frequency_power
        self._now_s = self._next_check_s = 0
        self._rows = self._num_unknown = 0
        self._seen_s_R, self._vocabulary_R = ReservedArray(np.uint32), ReservedArray(np.int16)
        self._batches_R = ReservedArray(np.uint32)  # how many batches had it; only for a rate by frequency
        self._recent: I64 = np.zeros(0, np.int64)  # rows of the batch before

    @property
    def has_budgets(self) -> bool:
        """Whether only so many ids may have rows."""
        return bool(self._pools)

    def advance(self, event_time_ms: int) -> I64:
        """Set the clock, and return the rows that expire now. They are free from then on."""
        before_s, self._now_s = self._now_s, max(self._now_s, min(event_time_ms // 1000, _LATEST_S))
        if before_s == 0:
            self._seen_s[:] = self._now_s
            self._next_check_s = self._now_s + self._check_s
        if self._now_s < self._next_check_s:
            return np.zeros(0, np.int64)
        self._next_check_s = self._now_s + self._check_s
        limit_s = np.where(np.isinf(self._expire_s), -1, self._now_s - np.minimum(self._expire_s, _LATEST_S))
        rows: I64 = not_seen_since(self._seen_s, self._vocabulary, limit_s.astype(np.int64))
        rows = rows[not_among(rows, self._recent)]
        self._free(rows)
        return rows

    def make_room(self, vocabulary_N: I64, needed: I64) -> tuple[I64, Bool]:
        """Make room for new ids, if a budget has none left.

        Of several ranks, all count: the rows that were not seen for the longest time go, whichever ranks have them (of
        one second those of the lower rank first). If there are too few of them, new ids of lower ranks get rows first.

        Args:
            vocabulary_N: int64, the vocabularies of the new ids.
            needed: Rows that the batch reads already.

        Returns:
            (the rows that are given back, and free from now on; which of the new ids may have a row, bool [N]).
        """
        fits_N = np.ones(len(vocabulary_N), np.bool_)
        given_back = [np.zeros(0, np.int64)]
        new_P = [np.flatnonzero(pool.has_V[vocabulary_N]) for pool in self._pools]
        used_RP, new_RP = self._of_all_ranks([pool.used for pool in self._pools], [len(mine) for mine in new_P])
        for p, (pool, mine) in enumerate(zip(self._pools, new_P, strict=True)):
            used, before = int(used_RP[:, p].sum()), int(new_RP[: self._world.rank, p].sum())
            missing = used + int(new_RP[:, p].sum()) - pool.budget
            if missing <= 0:
                continue
            rows = pool.take_oldest(missing, self._seen_s, self._vocabulary, np.concatenate([needed, self._recent]))
            own, found = self._oldest_of_all(rows, missing)
            pool.put_back(rows[own:], self._seen_s)
            self._free(rows[:own])
            given_back.append(rows[:own])
            fits_N[mine[max(pool.budget - (used - found) - before, 0) :]] = False
        return np.concatenate(given_back), fits_N

    def _of_all_ranks(self, *counts: list[int]) -> I64:
        """Lists of one length, of all ranks. int64 [lists, ranks, length]."""
        if self._world.size == 1 or not counts[0]:
            return np.array(counts, np.int64).reshape(len(counts), 1, -1)
        import torch  # where there are ranks, it is there; compiling loops needs none

        each = [1] * self._world.size
        of_ranks: I64 = self._world.trade(torch.tensor([counts] * self._world.size), each, each).numpy()
        return of_ranks.transpose(1, 0, 2)

    def _oldest_of_all(self, rows: I64, count: int) -> tuple[int, int]:
        """How many of this rank's rows, the oldest first, and of all ranks' are the ``count`` oldest of all."""
        if self._world.size == 1:
            return len(rows), len(rows)
        import torch

        seen_s = [part.numpy() for part in self._world.gather(torch.from_numpy(self._seen_s[rows].astype(np.int64)))]
        ranks = np.repeat(np.arange(self._world.size), [len(part) for part in seen_s])
        first = ranks[np.argsort(np.concatenate(seen_s), kind="stable")[:count]]
        return int(np.count_nonzero(first == self._world.rank)), len(first)

    def born(self, rows_N: I64, vocabulary_N: I64 | int) -> None:
        """Rows get new ids, of these vocabularies; by default of none, for rows that are never given back."""
        self._reserve(int(rows_N.max(initial=-1)) + 1)
        self._seen_s[rows_N] = self._now_s
        self._vocabulary[rows_N] = vocabulary_N
        if self._power:
            self._batches_R.array[rows_N] = 0
        self._count(rows_N, 1)

    def born_required(self, rows_N: I64) -> None:
        """Rows are born that are never given back."""
        self.born(rows_N, _NOBODY)

    def born_unknown(self, rows_N: I64) -> None:
        """Rows get ids whose vocabularies are not known yet."""
        self.born(rows_N, self._unknown)
        self._num_unknown += len(rows_N)

    def know(self, rows_N: I64, vocabulary_N: I64) -> None:
        """Say which vocabularies the ids of some rows have, for those of which it was not known."""
        if self._num_unknown:
            news = self._vocabulary[rows_N] == self._unknown
            rows = rows_N[news]
            self._count(rows, -1)
            self._vocabulary[rows] = vocabulary_N[news]
            self._count(rows, 1)
            self._num_unknown -= len(rows)

    def touch(self, rows_U: I64) -> tuple[F32 | None, F32 | None]:
        """Rows are read by a batch.

        Returns:
            (what their accumulators keep, float32 [U], None for all; factors on their learning rates, float32 [U], None
            for 1).
        """
        keep_U = rate_U = None
        if self._half_life_s is not None:
            elapsed_s = self._now_s - self._seen_s[rows_U].astype(np.float64)
            keep_U = np.exp2(-elapsed_s / self._half_life_s).astype(np.float32)
        if self._power:
            self._batches_R.array[rows_U] += 1
            rate_U = (self._batches_R.array[rows_U].astype(np.float64) ** -self._power).astype(np.float32)
        self._seen_s[rows_U] = self._now_s
        self._recent = rows_U
        return keep_U, rate_U

    def state(self) -> Arrays:
        """Copies from which :meth:`load_state` continues."""
        state: Arrays = {
            "clock": np.array([self._now_s, self._next_check_s]),
            "recent": self._recent,
            "seen_s": self._seen_s.view(np.int32).copy(),
            "vocabulary": self._vocabulary.copy(),
        }
        if self._power:
            state["batches"] = self._batches_R.array[: self._rows].view(np.int32).copy()
        for n, pool in enumerate(self._pools):
            state |= prefixed(f"pool.{n}.", pool.state())
        return state

    def load_state(self, state: Arrays) -> None:
        """The inverse of :meth:`state`; of one with other rules what still applies."""
        self._rows = 0
        self._reserve(len(state["seen_s"]))
        self._now_s, self._next_check_s = (int(n) for n in state["clock"])
        self._next_check_s = min(self._next_check_s, self._now_s + self._check_s)
        self._recent = state["recent"].copy()
        self._seen_s[:] = state["seen_s"].view(np.uint32)
        self._vocabulary[:] = state["vocabulary"]
        if self._power:
            batches = state.get("batches", np.zeros(self._rows, np.int32))
            self._batches_R.array[: self._rows] = batches.view(np.uint32)
        self._num_unknown = int((self._vocabulary == self._unknown).sum())
        for n, pool in enumerate(self._pools):
            pool.used = int(pool.has(self._vocabulary).sum())
            pool.load_state(under(f"pool.{n}.", state))

    @property
    def _seen_s(self) -> Seconds:
        return self._seen_s_R.array[: self._rows]

    @property
    def _vocabulary(self) -> Vocabularies:
        return self._vocabulary_R.array[: self._rows]

    def _reserve(self, rows: int) -> None:
        if rows > self._rows:
            self._seen_s_R.reserve(rows)
            self._vocabulary_R.reserve(rows)
            if self._power:
                self._batches_R.reserve(rows)
            self._rows = rows

    def _free(self, rows_N: I64) -> None:
        self._num_unknown -= int((self._vocabulary[rows_N] == self._unknown).sum())
        self._count(rows_N, -1)
        self._vocabulary[rows_N] = _NOBODY

    def _count(self, rows_N: I64, sign: int) -> None:
        for pool in self._pools:
            pool.used += sign * int(pool.has(self._vocabulary[rows_N]).sum())


class _Pool:
    """Vocabularies with one budget, and the oldest of their rows that a search has found."""

    def __init__(self, members: Sequence[int], vocabularies: int, budget: int) -> None:
        self.budget, self.used = budget, 0
        self.has_V = np.zeros(vocabularies + 1, np.bool_)  # the last place is that of _NOBODY
        self.has_V[members] = True
        self._rows: I64 = np.zeros(0, np.int64)
        self._seen_s = np.zeros(0, np.uint32)

    def has(self, vocabulary_N: Vocabularies) -> Bool:
        """Which rows count for this budget."""
        result: Bool = self.has_V[vocabulary_N]
        return result

    def take_oldest(self, count: int, seen_s: Seconds, vocabulary: Vocabularies, needed: I64) -> I64:
        """The oldest rows except those that are needed; fewer than ``count`` if there are no more."""
        rows = self._take(count, seen_s, vocabulary, needed)
        if len(rows) < count:
            found = oldest(seen_s, vocabulary, self.has_V[:-1], max(count + len(needed), self.budget // _SHARE))
            found = found[not_among(found, rows)]
            self._rows = found[np.argsort(seen_s[found], kind="stable")]
            self._seen_s = seen_s[self._rows]
            rows = np.concatenate([rows, self._take(count - len(rows), seen_s, vocabulary, needed)])
        return rows

    def put_back(self, rows: I64, seen_s: Seconds) -> None:
        """Give back the last ones of those that :meth:`take_oldest` gave, unchanged."""
        if len(rows):
            self._rows = np.concatenate([rows, self._rows])
            self._seen_s = np.concatenate([seen_s[rows], self._seen_s])

    def _take(self, count: int, seen_s: Seconds, vocabulary: Vocabularies, needed: I64) -> I64:
        """Take rows from those found; some of them may have been seen or given back since."""
        taken = [np.zeros(0, np.int64)]
        while count and len(self._rows):
            rows, found_s = self._rows[:count], self._seen_s[:count]
            self._rows, self._seen_s = self._rows[count:], self._seen_s[count:]
            rows = rows[(seen_s[rows] == found_s) & self.has(vocabulary[rows])]
            taken.append(rows[not_among(rows, needed)])
            count -= len(taken[-1])
        return np.concatenate(taken)

    def state(self) -> Arrays:
        """What :meth:`load_state` continues from."""
        return {"rows": self._rows.copy(), "seen_s": self._seen_s.view(np.int32).copy()}

    def load_state(self, state: Arrays) -> None:
        """The inverse of :meth:`state`; an empty state leaves the search to be done anew."""
        if state:
            self._rows, self._seen_s = state["rows"].copy(), state["seen_s"].view(np.uint32).copy()
