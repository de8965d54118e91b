"""Builds users' histories while a log is replayed: each user's last impressions with their outcomes, as of a cutoff.

:class:`smes.schema.History` says what a history holds and what its cutoff is. Memory grows with the number of users, by
one history for each, and not with the length of the log.

Letters: N impressions, M impressions with those carried over from the block before, T tasks, K tasks that outcomes
cover, U users, L length of a history, S kept histories.
"""

from collections import deque
from typing import NamedTuple, Self

import numpy as np
from numba import njit

from smes.arrays import I32, I64, GrowingColumns
from smes.events import ImpressionBlock
from smes.hashing import splitmix64
from smes.id_map import IdMap
from smes.schema import MISSING, Schema

REQUESTS_KEPT = 65_536
"""How many requests' histories are kept by default."""

_NEVER = np.iinfo(np.int32).max  # delay in ms of an outcome that does not happen, or happens after 24 days or more
_ROWS = 1024  # rows to make room for at first


class HistoryBuilder:
    """Fills the history columns of impressions, which must come in the order of their event times.

    Args:
        schema: A schema with a history.
        requests_kept: All rows of a request get the same history, as long as no more than this many other requests
            begin between its first row and its last.
    """

    def __init__(self, schema: Schema, requests_kept: int = REQUESTS_KEPT) -> None:
        assert schema.history is not None, "a schema with a history"
        self._window_ms = schema.history.window_ms
        self._tasks = np.array(schema.history_tasks, np.int64)
        self._items = schema.id_slices[schema.history.items]
        self._outcomes = schema.id_slices[schema.history.outcomes]
        length = self._items.stop - self._items.start
        self._users = IdMap()
        self._rings = GrowingColumns(_Rings.empty(_ROWS, length, len(self._tasks))._asdict())
        # Histories that several impressions share: of each user's window, and of each request.
        self._slots = IdMap()
        self._kept = GrowingColumns(_Kept.empty(_ROWS, length)._asdict())
        self._requests: deque[I64] = deque()
        self._num_requests = 0
        self._requests_kept = requests_kept
        # The impressions of the latest event time. They are not in the rings yet: the next block may begin with
        # impressions of the same time, and those must not see them.
        self._latest: _Impressions | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the users' last impressions and of the kept histories."""
        return self._rings.nbytes + self._kept.nbytes

    def fill(self, impressions: ImpressionBlock, times_NT: I64) -> None:
        """Write the columns of the history.

        Args:
            impressions: The next N ≥ 1 impressions; their ``ids`` are written to.
            times_NT: int64 [N, T], when positive feedback to each impression happens, ``MISSING`` where it does not.
        """
        rows = _Impressions.of(self._users.insert(impressions.user_id), impressions, times_NT[:, self._tasks])
        if self._latest is not None:
            rows = self._latest.then(rows)
        self._rings.reserve(self._users.num_rows)
        cutoffs = self._cutoffs(impressions)
        _fill(
            rows,
            cutoffs,
            _Rings(**self._rings.arrays),
            _Kept(**self._kept.arrays),
            impressions.ids[:, self._items],
            impressions.ids[:, self._outcomes],
        )
        self._latest = rows.latest()

    def _cutoffs(self, impressions: ImpressionBlock) -> "_Cutoffs":
        """Find the cutoff of each impression, and the slot of the history as of that cutoff."""
        has_request = impressions.request_id != MISSING
        window = impressions.event_time_ms // self._window_ms
        request = splitmix64(splitmix64(impressions.user_id).view(np.int64) ^ impressions.request_id).view(np.int64)
        key = np.where(has_request, request, splitmix64(impressions.user_id ^ np.int64(MISSING)).view(np.int64))
        self._forget_requests()
        known = self._slots.find(key)
        slot = self._slots.insert(key)
        self._kept.reserve(self._slots.num_rows)
        new = known < 0
        self._kept.arrays["as_of"][slot[new]] = MISSING
        begun = np.unique(key[new & has_request])
        if len(begun):
            self._requests.append(begun)
            self._num_requests += len(begun)
        return _Cutoffs(
            slot=slot,
            as_of=np.where(has_request, 0, window),
            time=np.where(has_request, impressions.event_time_ms, window * self._window_ms),
        )

    def _forget_requests(self) -> None:
        while self._requests and self._num_requests - len(self._requests[0]) >= self._requests_kept:
            oldest = self._requests.popleft()
            self._slots.remove(oldest)
            self._num_requests -= len(oldest)


# The kernels take these named tuples. Numba's cache files refer to them by name: rename a kernel together with its
# tuple, or a cache from before the renaming cannot be read.


class _Impressions(NamedTuple):
    """Impressions in the order of their times.

    Attributes:
        user: int64 [M], row of the user.
        time: int64 [M], Unix milliseconds.
        item: int64 [M].
        delay: int32 [M, K], milliseconds from the impression to its positive outcome, ``_NEVER`` where there is none.
    """

    user: I64
    time: I64
    item: I64
    delay: I32

    @classmethod
    def of(cls, user: I64, impressions: ImpressionBlock, times_NK: I64) -> Self:
        time = impressions.event_time_ms
        delay = np.where(times_NK == MISSING, _NEVER, times_NK - time[:, None]).clip(0, _NEVER)
        return cls(user, time, impressions.item_id, delay.astype(np.int32))

    def then(self, other: Self) -> Self:
        """These impressions followed by others."""
        return type(self)(*(np.concatenate([a, b]) for a, b in zip(self, other, strict=True)))

    def latest(self) -> Self:
        """The impressions of the latest time."""
        rows = self.time == self.time[-1]
        return type(self)(*(column[rows] for column in self))


class _Cutoffs(NamedTuple):
    """Per impression of a block, int64 [N] each.

    Attributes:
        slot: Where the impression's history is kept.
        as_of: The history in the slot is this impression's if it was kept with the same value: the number of the
            window, or 0 for a request.
        time: The cutoff, Unix milliseconds.
    """

    slot: I64
    as_of: I64
    time: I64


class _Rings(NamedTuple):
    """Each user's last L impressions in a ring buffer: the k-th impression is at place k modulo L.

    Attributes:
        seen: int64 [U], how many impressions the user has had.
        time: int64 [U, L].
        item: int64 [U, L].
        delay: int32 [U, L, K].
    """

    seen: I64
    time: I64
    item: I64
    delay: I32

    @classmethod
    def empty(cls, users: int, length: int, num_tasks: int) -> Self:
        shape = (users, length)
        return cls(
            np.zeros(users, np.int64),
            np.zeros(shape, np.int64),
            np.zeros(shape, np.int64),
            np.zeros((*shape, num_tasks), np.int32),
        )


class _Kept(NamedTuple):
    """Histories that several impressions share.

    Attributes:
        as_of: int64 [S], see :class:`_Cutoffs`; ``MISSING`` for an empty slot.
        items: int64 [S, L].
        outcomes: int64 [S, L].
    """

    as_of: I64
    items: I64
    outcomes: I64

    @classmethod
    def empty(cls, slots: int, length: int) -> Self:
        return cls(np.zeros(slots, np.int64), np.zeros((slots, length), np.int64), np.zeros((slots, length), np.int64))


@njit(cache=True, nogil=True)
def _fill(
    impressions: _Impressions, cutoffs: _Cutoffs, rings: _Rings, kept: _Kept, out_items: I64, out_outcomes: I64
) -> None:  # pragma: no cover - compiled
    """Write the histories of the last N of M impressions, and move all but those of the latest time into the rings."""
    num_impressions = len(cutoffs.slot)
    carried = len(impressions.time) - num_impressions
    pushed = 0
    for n in range(num_impressions + 1):
        # An impression belongs to the past of impressions with a later time only.
        until = impressions.time[carried + n] if n < num_impressions else impressions.time[-1]
        while impressions.time[pushed] < until:
            u = impressions.user[pushed]
            place = rings.seen[u] % rings.time.shape[1]
            rings.time[u, place] = impressions.time[pushed]
            rings.item[u, place] = impressions.item[pushed]
            rings.delay[u, place] = impressions.delay[pushed]
            rings.seen[u] += 1
            pushed += 1
        if n == num_impressions:
            break
        s = cutoffs.slot[n]
        if kept.as_of[s] != cutoffs.as_of[n]:
            kept.as_of[s] = cutoffs.as_of[n]
            _keep(rings, impressions.user[carried + n], cutoffs.time[n], kept.items[s], kept.outcomes[s])
        out_items[n] = kept.items[s]
        out_outcomes[n] = kept.outcomes[s]


@njit(cache=True, nogil=True)
def _keep(rings: _Rings, user: int, cutoff: int, items: I64, outcomes: I64) -> None:  # pragma: no cover - compiled
    """Write a user's impressions before the cutoff, newest first, with the outcomes that were known by then."""
    total, length = rings.seen[user], rings.time.shape[1]
    kept = 0
    for back in range(1, min(total, length) + 1):
        place = (total - back) % length
        time = rings.time[user, place]
        if time < cutoff:
            outcome = 0
            for k in range(rings.delay.shape[2]):
                if rings.delay[user, place, k] != _NEVER and rings.delay[user, place, k] < cutoff - time:
                    outcome |= 1 << k
            items[kept] = rings.item[user, place]
            outcomes[kept] = outcome
            kept += 1
    items[kept:] = MISSING
    outcomes[kept:] = MISSING
