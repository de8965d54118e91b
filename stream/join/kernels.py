"""The join's inner loops, one event at a time, compiled by numba.

They change the entries (:mod:`stream.join.entries`) in place. Letters: N events of a block, T tasks, P partitions.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from smes.arrays import F32, I32, I64, U64, Bool
from stream.join.entries import DONE, EARLY, FREE, U8, WAITING, Entries
from stream.join.ledgers import CORRECTED, DUPLICATE, HELD, LATE, ORPHANED, READ, USED
from stream.join.waits import Stages


class Impressions(NamedTuple):
    """A block of impressions, [N] each: entry, partition, event time, own watermark before, tasks without label."""

    entry: I64
    partition: I32
    event_time_ms: I64
    before_ms: I64
    no_label: U64


class Feedback(NamedTuple):
    """A block of feedback, [N] each: entry, partition, time, own watermark just before it, task, value, arrival."""

    entry: I64
    partition: I32
    event_time_ms: I64
    before_ms: I64
    task: I32
    value: F32
    arrival_ms: I64


class Emitted(NamedTuple):
    """Examples that were emitted, int64 [N] each.

    Attributes:
        entry: Of which entry.
        due_ms: When it was due.
        example: Which one of its impression's: g below G at stage g, G + t with a correction of task t, G + T the
            closing one.
    """

    entry: I64
    due_ms: I64
    example: I64


class Ledgers(NamedTuple):
    """Counts per partition, int64 [P, :data:`stream.join.ledgers.COLUMNS`] each; the loops keep them up to date."""

    impressions: I64
    feedback: I64


@njit(cache=True)
def _stage_due(e: int, stage: int, entries: Entries, stages: Stages) -> int:  # pragma: no cover - compiled
    """When entry ``e`` is due at a stage: its wait is over, and nothing that was read before it is due any more.

    Callers pass int64: numba would compile a loop of its own for every other type of integer.
    """
    return int(max(entries.event_time_ms[e] + stages.wait_ms[stage], entries.read_ms[e]))


@njit(cache=True)
def _fate_of_label(e: int, t: int, entries: Entries, stages: Stages) -> int:  # pragma: no cover - compiled
    """``USED`` or ``CORRECTED``: whether the label of task ``t`` counts at its stage, or is an example of its own."""
    if entries.no_label[e] & (np.uint64(1) << np.uint64(t)) != 0:
        return USED
    is_positive, stage = entries.labels[e, t] > 0, stages.of_task[t]
    in_time = entries.label_due_ms[e, t] <= _stage_due(e, stage, entries, stages) and entries.stage[e] <= stage
    if in_time and not (is_positive and stages.positives_follow[t]):
        return USED
    # It was taken for a negative at its stage already.
    return USED if stages.is_binary[t] and not is_positive else CORRECTED


@njit(cache=True)
def _next_due(e: int, entries: Entries, stages: Stages) -> tuple[int, int]:  # pragma: no cover - compiled
    """When which example of a waiting entry is due next, as :func:`settle_due` numbers them."""
    num_stages, num_tasks = len(stages.wait_ms), len(stages.window_ms)
    if entries.stage[e] < num_stages:
        example = int(np.int64(entries.stage[e]))
        due_ms = _stage_due(e, example, entries, stages)
    else:
        example = num_stages + num_tasks
        due_ms = int(entries.event_time_ms[e] + stages.window_ms.max())
    if entries.pending[e] != 0:
        for t in range(num_tasks):
            if entries.pending[e] & (np.uint64(1) << np.uint64(t)) == 0:
                continue
            label_ms = max(entries.label_due_ms[e, t], _stage_due(e, stages.of_task[t], entries, stages))
            if label_ms < due_ms or (label_ms == due_ms and num_stages + t < example):
                due_ms, example = label_ms, num_stages + t
    return due_ms, example


@njit(cache=True)
def admit_impressions(
    events: Impressions, entries: Entries, ledgers: Ledgers, stages: Stages
) -> U8:  # pragma: no cover - compiled
    """Let impressions that are in time wait; settle the feedback that was read before them.

    Returns:
        uint8 [N], what became of each: ``HELD``, ``LATE`` or ``DUPLICATE``.
    """
    outcome = np.empty(len(events.entry), np.uint8)
    max_window_ms = stages.window_ms.max()
    for i in range(len(outcome)):
        e, time = events.entry[i], events.event_time_ms[i]
        if entries.status[e] == WAITING or entries.status[e] == DONE:
            outcome[i] = DUPLICATE
        elif time + max_window_ms < events.before_ms[i]:
            outcome[i] = LATE
        else:
            entries.event_time_ms[e] = time
            entries.read_ms[e] = events.before_ms[i]
            entries.stage[e] = 0
            entries.pending[e] = 0
            entries.no_label[e] = events.no_label[i]
            if entries.status[e] == FREE:
                entries.seen[e] = 0
                entries.attached[e] = 0
            else:
                _settle_early(e, entries, ledgers, stages)
            entries.status[e] = WAITING
            entries.partition[e] = events.partition[i]
            entries.due_ms[e] = _stage_due(e, np.int64(0), entries, stages)
            outcome[i] = HELD
        ledgers.impressions[events.partition[i], READ] += 1
        ledgers.impressions[events.partition[i], outcome[i]] += 1
    return outcome


@njit(cache=True)
def _settle_early(e: int, entries: Entries, ledgers: Ledgers, stages: Stages) -> None:  # pragma: no cover - compiled
    """Attach the feedback that entry ``e`` holds to its impression, or find it late or orphaned."""
    time = entries.event_time_ms[e]
    for t in range(entries.labels.shape[1]):
        bit = np.uint64(1) << np.uint64(t)
        if entries.attached[e] & bit == 0:
            continue
        fate = _fate_of_label(e, t, entries, stages)
        if time < entries.not_before_ms[e, t]:
            fate = LATE
        elif entries.label_time_ms[e, t] < time - stages.lateness_ms:
            fate = ORPHANED
        if fate == CORRECTED:
            entries.pending[e] |= bit
        elif fate != USED:
            entries.attached[e] &= ~bit
        ledgers.feedback[entries.label_partition[e, t], HELD] -= 1
        ledgers.feedback[entries.label_partition[e, t], fate] += 1


@njit(cache=True)
def attach_feedback(
    events: Feedback, entries: Entries, ledgers: Ledgers, stages: Stages
) -> U8:  # pragma: no cover - compiled
    """Attach each feedback to its waiting impression, or hold it until the impression is read.

    Returns:
        uint8 [N], what became of each: ``USED``, ``CORRECTED``, ``HELD``, ``LATE``, ``DUPLICATE`` or ``ORPHANED``.
    """
    outcome = np.empty(len(events.entry), np.uint8)
    max_window_ms = stages.window_ms.max()
    for i in range(len(outcome)):
        e, t, time = events.entry[i], np.int64(events.task[i]), events.event_time_ms[i]
        bit = np.uint64(1) << np.uint64(t)
        if entries.status[e] == FREE:
            entries.seen[e] = 0
            entries.attached[e] = 0
        if entries.seen[e] & bit != 0:
            outcome[i] = DUPLICATE
        elif entries.status[e] == DONE:
            outcome[i] = LATE
        elif entries.status[e] == WAITING:
            shown_ms = entries.event_time_ms[e]
            if time > shown_ms + stages.window_ms[t] or events.before_ms[i] > shown_ms + max_window_ms:
                outcome[i] = LATE
            elif time < shown_ms - stages.lateness_ms:
                outcome[i] = ORPHANED
            else:
                outcome[i] = USED
        else:
            _hold_early(i, events, entries, stages)
            outcome[i] = HELD
        entries.seen[e] |= bit
        if outcome[i] == USED or outcome[i] == HELD:
            entries.attached[e] |= bit
            entries.labels[e, t] = events.value[i]
            entries.label_time_ms[e, t] = time
            entries.label_due_ms[e, t] = max(time, events.before_ms[i])
            entries.label_arrival_ms[e, t] = events.arrival_ms[i]
        if outcome[i] == USED:
            outcome[i] = _fate_of_label(e, t, entries, stages)
            if outcome[i] == CORRECTED:
                entries.pending[e] |= bit
                entries.due_ms[e] = _next_due(e, entries, stages)[0]
        ledgers.feedback[events.partition[i], READ] += 1
        ledgers.feedback[events.partition[i], outcome[i]] += 1
    return outcome


@njit(cache=True)
def _hold_early(i: int, events: Feedback, entries: Entries, stages: Stages) -> None:  # pragma: no cover - compiled
    """Note feedback ``i`` in its entry until the impression is read, or can no longer be in time."""
    e, t, time = events.entry[i], events.task[i], events.event_time_ms[i]
    max_window_ms = stages.window_ms.max()
    expiry_ms = time + max_window_ms + stages.lateness_ms
    if entries.status[e] == EARLY:
        entries.due_ms[e] = max(entries.due_ms[e], expiry_ms)
    else:
        entries.due_ms[e] = expiry_ms
        entries.partition[e] = events.partition[i]
    entries.status[e] = EARLY
    entries.not_before_ms[e, t] = max(time - stages.window_ms[t], events.before_ms[i] - max_window_ms)
    entries.label_partition[e, t] = events.partition[i]


@njit(cache=True)
def known_labels(
    rows: I64, examples: I64, entries: Entries, stages: Stages
) -> tuple[Bool, Bool, Bool]:  # pragma: no cover - compiled
    """Find what examples of waiting entries show: at a stage its labels so far, in a correction one, in the end all.

    Args:
        rows: int64 [N], the entries.
        examples: int64 [N], as :attr:`Emitted.example`.
        entries: All entries.
        stages: The tasks' stages.

    Returns:
        bool [N, T] each: is there feedback in the example; does the label count; did the feedback come after the wait.
    """
    num_stages, num_tasks = len(stages.wait_ms), len(stages.window_ms)
    known = np.zeros((len(rows), num_tasks), np.bool_)
    counts, is_late = np.zeros_like(known), np.zeros_like(known)
    for i in range(len(rows)):
        e, example = rows[i], examples[i]
        is_closing = example == num_stages + num_tasks
        for t in range(num_tasks):
            stage, bit = stages.of_task[t], np.uint64(1) << np.uint64(t)
            if entries.no_label[e] & bit != 0:
                continue
            is_attached = entries.attached[e] & bit != 0
            is_late[i, t] = is_attached and entries.label_due_ms[e, t] > _stage_due(e, stage, entries, stages)
            if is_closing or example == num_stages + t:
                known[i, t] = is_attached
            elif example == stage:
                follows = is_late[i, t] or (stages.positives_follow[t] and entries.labels[e, t] > 0)
                known[i, t] = is_attached and not follows
            counts[i, t] = known[i, t] or (stages.is_binary[t] and (is_closing or example == stage))
    return known, counts, is_late


@njit(cache=True)
def restage(rows: I64, entries: Entries, stages: Stages) -> None:  # pragma: no cover - compiled
    """Let waiting impressions go on by other stages than those that they were read under.

    One that was emitted at a stage is emitted at none any more: what comes later are corrections and the closing
    example. One that was not is as if it had just been read.
    """
    for e in rows:
        if entries.status[e] != WAITING:
            continue
        if entries.stage[e] > 0:
            entries.stage[e] = len(stages.wait_ms)
        else:
            entries.pending[e] = 0
            for t in range(entries.labels.shape[1]):
                bit = np.uint64(1) << np.uint64(t)
                if entries.attached[e] & bit != 0 and _fate_of_label(e, t, entries, stages) == CORRECTED:
                    entries.pending[e] |= bit
        entries.due_ms[e] = _next_due(e, entries, stages)[0]


@njit(cache=True)
def settle_due(
    candidates: I64, watermark_ms: int, remember_ms: int, entries: Entries, ledgers: Ledgers, stages: Stages
) -> tuple[Emitted, I64]:  # pragma: no cover - compiled
    """Emit one example of each entry that the watermark has passed, or orphan or forget the entry.

    A candidate whose due time has moved on since it was noted is skipped: it was noted again. One that was emitted may
    be due again, and has to be noted.

    Returns:
        The examples emitted and the entries forgotten.
    """
    N = len(candidates)
    emitted = Emitted(np.empty(N, np.int64), np.empty(N, np.int64), np.empty(N, np.int64))
    forgotten = np.empty(N, np.int64)
    num_emitted, num_forgotten = 0, 0
    num_stages, num_tasks = len(stages.wait_ms), len(stages.window_ms)
    for i in range(N):
        e = candidates[i]
        if entries.due_ms[e] >= watermark_ms or entries.status[e] == FREE:
            continue
        if entries.status[e] == WAITING:
            due_ms, example = _next_due(e, entries, stages)
            emitted.entry[num_emitted] = e
            emitted.due_ms[num_emitted] = due_ms
            emitted.example[num_emitted] = example
            num_emitted += 1
            if example == 0:
                ledgers.impressions[entries.partition[e], HELD] -= 1
                ledgers.impressions[entries.partition[e], USED] += 1
            if (stages.is_whole and example == 0) or example == num_stages + num_tasks:
                entries.status[e] = DONE
                entries.due_ms[e] = due_ms + remember_ms
                continue
            if example < num_stages:
                entries.stage[e] += 1
            else:
                entries.pending[e] &= ~(np.uint64(1) << np.uint64(example - num_stages))
            entries.due_ms[e] = _next_due(e, entries, stages)[0]
            continue
        if entries.status[e] == EARLY:
            for t in range(entries.labels.shape[1]):
                if entries.attached[e] & (np.uint64(1) << np.uint64(t)) != 0:
                    ledgers.feedback[entries.label_partition[e, t], HELD] -= 1
                    ledgers.feedback[entries.label_partition[e, t], ORPHANED] += 1
        entries.status[e] = FREE
        forgotten[num_forgotten] = e
        num_forgotten += 1
    rows = slice(0, num_emitted)
    return Emitted(emitted.entry[rows], emitted.due_ms[rows], emitted.example[rows]), forgotten[:num_forgotten]
