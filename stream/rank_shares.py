"""The stream's state of some ranks, as other ranks need it: each partition p goes to rank p mod N.

Everything that belongs to a partition (:mod:`stream.partition_state`) stays as it is. Of what belongs to a rank's whole
stream:

================ =======================================================================================================
``watermark_ms`` The smallest of all ranks: nothing that waits is emitted before its time. Partitions that are ahead
                 judge lateness by their own watermarks, as ever.
``waits``        The same on all ranks.
``late_counts``  The sum, an equal share to each rank.
``begins_ms``    The latest.
batches          Those that were ready, and the half-filled one, are made of the examples anew: of all examples of a
                 rank's partitions, by the times at which they were due. They end before what comes next.
``ended``        Counts anew. What is written down of the ends of batches (:mod:`stream.batch_journal`) does not hold
                 any more: the share says so by :data:`OTHER_RANKS`.
================ =======================================================================================================

An impression and its feedback belong to partitions of the same number, so to the same rank. Where they do not (their
partitions were added between the two, or a producer goes by a rule of its own), they are apart:

- Feedback that waits for its impression in a partition of another rank is orphaned, and counted so in the ledger.
- An impression id of which two ranks know is kept once: as an impression before feedback alone, and as one that waits
  before one that is done. An impression that goes is counted as a duplicate if it still waited for its first example.

Letters: M entries, T tasks.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smes.arrays import Arrays, Bool
from stream.join.entries import DONE, WAITING
from stream.join.ledgers import DUPLICATE, HELD, ORPHANED
from stream.partition_state import OTHER_RANKS, load_rows, save_rows, saved_partitions, state_name
from stream.sources import Share
from stream.topics import FEEDBACK, IMPRESSIONS

_logger = logging.getLogger(__name__)

_OF_RANK = ("watermark_ms", "waits", "late_counts", "begins_ms", "ready_sizes", "ended", OTHER_RANKS)


def share_of_stream(parts: Sequence[Arrays], rank: int, size: int) -> Arrays:
    """The state that one of ``size`` ranks goes on from.

    Args:
        parts: What :meth:`stream.example_stream.ExampleStream.state` gives, of each rank, in their order. Not changed.
        rank, size: Of the rank that goes on.

    Returns:
        What :meth:`stream.example_stream.ExampleStream.load_state` takes.

    Raises:
        KeyError: An array is missing.
        ValueError: The states do not fit together.
    """
    mine = Share(rank, size)
    if any("waits" not in part for part in parts):
        raise ValueError("state of the stream: not of a join of impressions and feedback, which ranks can share out")
    whole = _put_together(parts)
    whole |= _without_what_is_apart(whole, size)
    share = {name: array for name, array in whole.items() if mine.has(_partition_in(name))}
    return share | _of_the_whole(parts, size) | _queued(parts, mine)


def _put_together(parts: Sequence[Arrays]) -> Arrays:
    """The arrays of all partitions."""
    whole: Arrays = {}
    for part in parts:
        of_partitions = {name: array for name, array in part.items() if name not in _OF_RANK}
        if twice := sorted(whole.keys() & of_partitions.keys()):
            raise ValueError(f"state of the stream: two ranks have {twice[0]}")
        whole |= of_partitions
    return whole


def _partition_in(name: str) -> int:
    """The partition that an array belongs to, by its name."""
    _, _, rest = name.partition("/")
    partition, slash, _ = rest.partition("/")
    if not slash or not partition.isdigit():
        raise ValueError(f"state of the stream: array {name!r}, expected topic/partition/what")
    return int(partition)


def _of_the_whole(parts: Sequence[Arrays], size: int) -> Arrays:
    """What belongs to no partition, except for batches."""
    waits = parts[0]["waits"]
    if any(not np.array_equal(part["waits"], waits) for part in parts):
        raise ValueError("state of the stream: tasks wait otherwise on some ranks, expected the same on all")
    found: Arrays = {
        "watermark_ms": np.min([part["watermark_ms"] for part in parts], axis=0),
        "waits": waits,
        "late_counts": np.sum([part["late_counts"] for part in parts], axis=0) / size,
    }
    if begins_ms := [part["begins_ms"] for part in parts if "begins_ms" in part]:
        found["begins_ms"] = np.max(begins_ms, axis=0)
    return found


def _queued(parts: Sequence[Arrays], mine: Share) -> Arrays:
    """The examples that are in no batch that was taken, as one half-filled batch."""
    tables = []
    for part in parts:
        table = load_rows(IMPRESSIONS, "queued", part)
        order = np.argsort(table.pop("order"))
        tables.append({name: column[order] for name, column in table.items()})
    columns = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    rows = np.flatnonzero([mine.has(p) for p in columns["partition"].tolist()])
    rows = rows[np.argsort(columns["due_ms"][rows], kind="stable")]
    columns = {name: column[rows] for name, column in columns.items()} | {"order": np.arange(len(rows))}
    partitions = sorted(p for part in parts for p in saved_partitions(part, IMPRESSIONS) if mine.has(p))
    counts = {"ready_sizes": np.zeros(0, np.int64), "ended": np.zeros(1, np.int64), OTHER_RANKS: np.ones(1, np.int64)}
    return counts | save_rows(IMPRESSIONS, "queued", columns, partitions)


def _without_what_is_apart(whole: Arrays, size: int) -> Arrays:
    """The tables and ledgers that change because what belongs together is not in partitions of one rank."""
    early, others = load_rows(FEEDBACK, "entry", whole), load_rows(IMPRESSIONS, "entry", whole)
    is_apart_MT = _attached(early) & (early["label_partition"] % size != early["partition"][:, None] % size)
    goes = _known_twice(early, others, size)
    if not (is_apart_MT.any() or any(rows_M.any() for rows_M in goes)):
        return {}
    early_goes_M, others_go_M = goes
    lost_MT = is_apart_MT | (_attached(early) & early_goes_M[:, None])
    held_M = others_go_M & (others["status"] == WAITING) & (others["stage"] == 0)
    _logger.warning(
        "impressions and feedback that belong together are in partitions of two ranks: %d feedback events are "
        "orphaned, %d impressions count as duplicates",
        lost_MT.sum(),
        held_M.sum(),
    )
    changed = _moved(whole, FEEDBACK, early["label_partition"][lost_MT], ORPHANED)
    changed |= _moved(whole, IMPRESSIONS, others["partition"][held_M], DUPLICATE)
    bits_T = np.uint64(1) << np.arange(lost_MT.shape[1], dtype=np.uint64)
    early["attached"] &= ~np.bitwise_or.reduce(np.where(lost_MT, bits_T, np.uint64(0)), axis=1)
    waiting = load_rows(IMPRESSIONS, "waiting", whole)  # in the order of those that wait
    tables = (
        (FEEDBACK, "entry", early, early_goes_M),
        (IMPRESSIONS, "entry", others, others_go_M),
        (IMPRESSIONS, "waiting", waiting, others_go_M[others["status"] == WAITING]),
    )
    for topic, what, columns, goes_M in tables:
        kept = {name: column[~goes_M] for name, column in columns.items()}
        changed |= save_rows(topic, what, kept, saved_partitions(whole, topic))
    return changed


def _attached(entries: Arrays) -> Bool:
    """The labels that entries hold. bool [M, T]."""
    tasks = np.arange(entries["labels"].shape[1], dtype=np.uint64)
    attached: Bool = (entries["attached"][:, None] >> tasks & np.uint64(1)) == 1
    return attached


def _known_twice(early: Arrays, others: Arrays, size: int) -> tuple[Bool, Bool]:
    """Which entries a rank would have twice, but for the one that it keeps. bool [M] of each table."""
    columns = [np.concatenate([early[name], others[name]]) for name in ("impression_id", "partition", "status")]
    ids, ranks, order = columns[0], columns[1] % size, np.select([columns[2] == WAITING, columns[2] == DONE], [0, 1], 2)
    by_id = np.lexsort((order, ranks, ids))
    again = (np.diff(ids[by_id]) == 0) & (np.diff(ranks[by_id]) == 0)
    goes = np.zeros(len(ids), np.bool_)
    goes[by_id[1:][again]] = True
    return goes[: len(early["status"])], goes[len(early["status"]) :]


def _moved(whole: Arrays, topic: str, partitions: NDArray[Any], fate: int) -> Arrays:
    """The ledgers of a topic in which events that waited have another fate; one event of each of these partitions."""
    ledgers = {}
    for partition, count in zip(*np.unique(partitions, return_counts=True), strict=True):
        name = state_name(topic, int(partition), "ledger")
        ledgers[name] = whole[name].copy()
        ledgers[name][HELD] -= count
        ledgers[name][fate] += count
    return ledgers
