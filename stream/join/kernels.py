"""The join's inner loops, one event at a time, compiled by numba.

Letters: N events of a block, M entries, T tasks. An *entry* is what the join knows of one impression id.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from smes.arrays import F32, I32, I64

FREE, EARLY, WAITING, DONE = 0, 1, 2, 3
"""Status of an entry: unused; feedback came before its impression; impression waits; emitted and remembered."""

ACCEPTED, LATE, DUPLICATE, ORPHANED = 0, 1, 2, 3
"""What became of an event."""

U8 = NDArray[np.uint8]
U64 = NDArray[np.uint64]


@njit(cache=True)
def watermarks_before(
    source: I32, event_time_ms: I64, latest_ms: I64, lateness_ms: int, floor_ms: int
) -> I64:  # pragma: no cover - compiled
    """Per event the watermark of its own source just before it; advances ``latest_ms`` [sources] in place.

    Judging lateness by the event's own source, never by how far others were read, makes the join's outcome independent
    of how reads interleave.
    """
    before = np.empty(len(source), np.int64)
    for i in range(len(source)):
        s = source[i]
        before[i] = max(latest_ms[s] - lateness_ms, floor_ms)
        latest_ms[s] = max(latest_ms[s], event_time_ms[i])
    return before


@njit(cache=True)
def admit_impressions(
    entry: I64,
    event_time_ms: I64,
    before_ms: I64,
    window_ms: I64,
    status: U8,
    due_ms: I64,
    entry_time_ms: I64,
    seen: U64,
    attached: U64,
    label_time_ms: I64,
    not_before_ms: I64,
    lateness_ms: int,
    outcome: U8,
) -> tuple[int, int]:  # pragma: no cover - compiled
    """Turn entries of impressions that are in time into waiting ones; settle feedback that came before them.

    ``before_ms`` is the watermark of the impression's own source (:func:`watermarks_before`). Returns how many held
    feedback events turned out (late, orphaned).
    """
    late, orphaned = 0, 0
    max_window_ms = window_ms.max()
    for i in range(len(entry)):
        e = entry[i]
        if status[e] == WAITING or status[e] == DONE:
            outcome[i] = DUPLICATE
            continue
        time = event_time_ms[i]
        if time + max_window_ms < before_ms[i]:
            outcome[i] = LATE
            continue
        if status[e] == FREE:
            seen[e] = 0
            attached[e] = 0
        if status[e] == EARLY:
            for t in range(len(window_ms)):
                bit = np.uint64(1) << np.uint64(t)
                if attached[e] & bit == 0:
                    continue
                if time < not_before_ms[e, t]:
                    late += 1
                elif label_time_ms[e, t] < time - lateness_ms:
                    orphaned += 1
                else:
                    continue
                attached[e] &= ~bit
        status[e] = WAITING
        due_ms[e] = time + max_window_ms
        entry_time_ms[e] = time
        outcome[i] = ACCEPTED
    return late, orphaned


@njit(cache=True)
def attach_feedback(
    entry: I64,
    task: I32,
    event_time_ms: I64,
    value: F32,
    arrival_ms: I64,
    before_ms: I64,
    window_ms: I64,
    status: U8,
    due_ms: I64,
    entry_time_ms: I64,
    seen: U64,
    attached: U64,
    labels: F32,
    label_time_ms: I64,
    label_arrival_ms: I64,
    not_before_ms: I64,
    lateness_ms: int,
    outcome: U8,
) -> None:  # pragma: no cover - compiled
    """Attach each feedback to its entry, or hold it there when the impression has not come yet.

    ``before_ms`` is the watermark of the feedback's own source (:func:`watermarks_before`).
    """
    max_window_ms = window_ms.max()
    for i in range(len(entry)):
        e, t, time = entry[i], task[i], event_time_ms[i]
        bit = np.uint64(1) << np.uint64(t)
        if status[e] == FREE:
            seen[e] = 0
            attached[e] = 0
        if seen[e] & bit != 0:
            outcome[i] = DUPLICATE
            continue
        seen[e] |= bit
        if status[e] == DONE:
            outcome[i] = LATE
            continue
        if status[e] == WAITING:
            if time > entry_time_ms[e] + window_ms[t] or before_ms[i] > due_ms[e]:
                outcome[i] = LATE
                continue
            if time < entry_time_ms[e] - lateness_ms:
                outcome[i] = ORPHANED
                continue
        else:
            expiry_ms = time + max_window_ms + lateness_ms
            due_ms[e] = max(due_ms[e], expiry_ms) if status[e] == EARLY else expiry_ms
            status[e] = EARLY
            not_before_ms[e, t] = max(time - window_ms[t], before_ms[i] - max_window_ms)
        attached[e] |= bit
        labels[e, t] = value[i]
        label_time_ms[e, t] = time
        label_arrival_ms[e, t] = arrival_ms[i]
        outcome[i] = ACCEPTED


@njit(cache=True)
def settle_due(
    candidates: I64, watermark_ms: int, remember_ms: int, status: U8, due_ms: I64, attached: U64
) -> tuple[I64, I64, int]:  # pragma: no cover - compiled
    """Entries whose time has come: (emitted, forgotten, feedback events orphaned).

    A candidate whose due time has moved on since it was noted is left alone: a later note speaks for it.
    """
    emitted = np.empty(len(candidates), np.int64)
    forgotten = np.empty(len(candidates), np.int64)
    num_emitted, num_forgotten, orphaned = 0, 0, 0
    for i in range(len(candidates)):
        e = candidates[i]
        if due_ms[e] >= watermark_ms:
            continue
        if status[e] == WAITING:
            status[e] = DONE
            due_ms[e] += remember_ms
            emitted[num_emitted] = e
            num_emitted += 1
        elif status[e] != FREE:
            if status[e] == EARLY:
                bits = attached[e]
                while bits != 0:
                    bits &= bits - np.uint64(1)
                    orphaned += 1
            status[e] = FREE
            forgotten[num_forgotten] = e
            num_forgotten += 1
    return emitted[:num_emitted], forgotten[:num_forgotten], orphaned
