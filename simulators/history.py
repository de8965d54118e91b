"""The users' histories as a log is replayed: each user's last impressions and what came of them, from the past only.

What is built, and as of when, is said by :class:`smes.schema.History`. Memory grows with the users, by the length of a
history each, never with the log.

Letters: N impressions, T tasks, K tasks that outcomes tell of, U users, L length of a history, S kept histories.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray

from smes.arrays import I32, I64
from smes.events import ImpressionBlock
from smes.hashing import splitmix64
from smes.id_map import IdMap
from smes.schema import MISSING, Schema

REQUESTS_KEPT = 65_536
"""A request's rows share one history if no more than this many other requests begin between them."""

_NEVER = np.iinfo(np.int32).max  # an outcome's delay in ms; 24 days and more are as good as never


class HistoryBuilder:
    """Writes the history into impressions that come in event-time order.

    Args:
        schema: With a history.
    """

    def __init__(self, schema: Schema) -> None:
        assert schema.history is not None, "a schema with a history"
        self._window_ms = schema.history.window_ms
        self._tasks = np.array(schema.history_tasks, np.int64)
        self._items = schema.id_slices[schema.history.items]
        self._outcomes = schema.id_slices[schema.history.outcomes]
        length = self._items.stop - self._items.start
        self._users = IdMap()
        # Per user a ring of the last impressions: the k-th shown lies at k modulo L.
        self._shown = np.zeros(0, np.int64)
        self._time = np.zeros((0, length), np.int64)
        self._item = np.zeros((0, length), np.int64)
        self._delay = np.zeros((0, length, len(self._tasks)), np.int32)
        # Histories as of a cutoff that several impressions share: of a user's window, or of a request.
        self._slots = IdMap()
        self._kept_as_of = np.zeros(0, np.int64)
        self._kept_items = np.zeros((0, length), np.int64)
        self._kept_outcomes = np.zeros((0, length), np.int64)
        self._requests: deque[I64] = deque()
        self._num_requests = 0
        # Impressions of the latest time: not in the past of others of that time, so not in the rings yet.
        self._latest: _Shown | None = None

    def fill(self, impressions: ImpressionBlock, times_NT: I64) -> None:
        """Write the history's columns.

        Args:
            impressions: The next N ≥ 1 impressions; their ``ids`` are written to.
            times_NT: int64 [N, T], when positive feedback to them happens, ``MISSING`` where it does not.
        """
        shown = _Shown.of(self._users.insert(impressions.user_id), impressions, times_NT[:, self._tasks])
        if self._latest is not None:
            shown = self._latest.then(shown)
        self._grow_users()
        slot, as_of, cutoff = self._cutoffs(impressions)
        _fill(
            *shown.columns(),
            *(slot, as_of, cutoff),
            *(self._shown, self._time, self._item, self._delay),
            *(self._kept_as_of, self._kept_items, self._kept_outcomes),
            *(impressions.ids[:, self._items], impressions.ids[:, self._outcomes]),
        )
        self._latest = shown.latest()

    def _cutoffs(self, impressions: ImpressionBlock) -> tuple[I64, I64, I64]:
        """Per impression: where its history is kept, what tells whether that is still the one, and its cutoff."""
        has_request = impressions.request_id != MISSING
        window = impressions.event_time_ms // self._window_ms
        request = splitmix64(splitmix64(impressions.user_id).view(np.int64) ^ impressions.request_id).view(np.int64)
        key = np.where(has_request, request, splitmix64(impressions.user_id ^ np.int64(MISSING)).view(np.int64))
        self._forget_requests()
        known = self._slots.find(key)
        slot = self._slots.insert(key)
        self._grow_slots()
        new = known < 0
        self._kept_as_of[slot[new]] = MISSING
        begun = np.unique(key[new & has_request])
        if len(begun):
            self._requests.append(begun)
            self._num_requests += len(begun)
        as_of = np.where(has_request, 0, window)
        cutoff = np.where(has_request, impressions.event_time_ms, window * self._window_ms)
        return slot, as_of, cutoff

    def _forget_requests(self) -> None:
        while self._requests and self._num_requests - len(self._requests[0]) >= REQUESTS_KEPT:
            oldest = self._requests.popleft()
            self._slots.remove(oldest)
            self._num_requests -= len(oldest)

    def _grow_users(self) -> None:
        rows = self._users.num_rows
        if rows > len(self._shown):
            size = max(rows, 2 * len(self._shown), 1024)
            self._shown, self._time = _grown(self._shown, size), _grown(self._time, size)
            self._item, self._delay = _grown(self._item, size), _grown(self._delay, size)

    def _grow_slots(self) -> None:
        rows = self._slots.num_rows
        if rows > len(self._kept_as_of):
            size = max(rows, 2 * len(self._kept_as_of), 1024)
            self._kept_as_of = _grown(self._kept_as_of, size)
            self._kept_items = _grown(self._kept_items, size)
            self._kept_outcomes = _grown(self._kept_outcomes, size)


@dataclass(frozen=True, slots=True)
class _Shown:
    """Impressions as the rings keep them.

    Attributes:
        user: int64 [N], row of the user.
        time: int64 [N], Unix milliseconds.
        item: int64 [N].
        delay: int32 [N, K], milliseconds from the impression to the positive outcome, ``_NEVER`` where there is none.
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

    def columns(self) -> tuple[I64, I64, I64, I32]:
        return self.user, self.time, self.item, self.delay

    def then(self, other: Self) -> Self:
        """The rows of both."""
        first, second = self.columns(), other.columns()
        return type(self)(*(np.concatenate([a, b]) for a, b in zip(first, second, strict=True)))

    def latest(self) -> Self:
        """The rows of the latest time."""
        rows = self.time == self.time[-1]
        return type(self)(*(column[rows] for column in self.columns()))


def _grown(old: NDArray[Any], size: int) -> NDArray[Any]:
    new = np.zeros((size, *old.shape[1:]), old.dtype)
    new[: len(old)] = old
    return new


@njit(cache=True, nogil=True)
def _fill(
    user: I64, time: I64, item: I64, delay: I32,
    slot: I64, as_of: I64, cutoff: I64,
    ring_shown: I64, ring_time: I64, ring_item: I64, ring_delay: I32,
    kept_as_of: I64, kept_items: I64, kept_outcomes: I64,
    out_items: I64, out_outcomes: I64,
) -> None:  # pragma: no cover - compiled  # fmt: skip  # one line a kind
    """Histories of the last ``len(slot)`` of the impressions; all but those of the latest time end up in the rings."""
    carried = len(time) - len(slot)
    pushed = 0
    for n in range(len(slot) + 1):
        # An impression is in the past of those of a later time only. At the end: all but the latest, which the next
        # block may share.
        until = time[carried + n] if n < len(slot) else time[-1]
        while time[pushed] < until:
            u = user[pushed]
            place = ring_shown[u] % ring_time.shape[1]
            ring_time[u, place] = time[pushed]
            ring_item[u, place] = item[pushed]
            ring_delay[u, place] = delay[pushed]
            ring_shown[u] += 1
            pushed += 1
        if n == len(slot):
            break
        s, u = slot[n], user[carried + n]
        if kept_as_of[s] != as_of[n]:
            kept_as_of[s] = as_of[n]
            _keep(ring_shown[u], ring_time[u], ring_item[u], ring_delay[u], cutoff[n], kept_items[s], kept_outcomes[s])
        out_items[n] = kept_items[s]
        out_outcomes[n] = kept_outcomes[s]


@njit(cache=True, nogil=True)
def _keep(
    shown: int, time: I64, item: I64, delay: I32, cutoff: int, items: I64, outcomes: I64
) -> None:  # pragma: no cover - compiled
    """A user's entries before the cutoff, newest first, with the outcomes that were known by then."""
    count = 0
    for back in range(1, min(shown, len(time)) + 1):
        place = (shown - back) % len(time)
        if time[place] < cutoff:
            outcome = 0
            for k in range(delay.shape[1]):
                if delay[place, k] != _NEVER and delay[place, k] < cutoff - time[place]:
                    outcome |= 1 << k
            items[count] = item[place]
            outcomes[count] = outcome
            count += 1
    items[count:] = MISSING
    outcomes[count:] = MISSING
