"""The id table's state of some ranks, as other ranks need it: each row goes to the rank that owns its key.

Exact, by key: the rows, their accumulators, vocabularies and ages. Row numbers are others. Of a search for the rows
that were not seen for the longest time nothing is kept: it is done anew. How often ids without a row were seen is
approximate, as it always is (:mod:`smes.model.admission`), and never too few: each counter becomes the largest of those
at its place, for the sightings of an id are counted by one rank alone.

Letters: R rows of a rank's table, N rows that are kept of it.
"""

from collections.abc import Sequence

import numpy as np

from smes.arrays import I64, Arrays
from smes.model.shards import owner_of

_KEYS, _FREE, _COUNTS, _CLOCK, _RECENT = "table.keys", "rows.free", "rows.counts", "rows.ages.clock", "rows.ages.recent"
_BY_ROW = (_KEYS, "table.records", "rows.vocabulary", "rows.ages.seen_s", "rows.ages.vocabulary", "rows.ages.batches")
_COUNTERS, _COUNTED = "rows.sightings.counters", "rows.sightings.counted"
_SEARCHES = "rows.ages.pool."
_KNOWN = {*_BY_ROW, _FREE, _COUNTS, _CLOCK, _RECENT, _COUNTERS, _COUNTED}
_BORN = 0  # of the counts


def share_of_rows(parts: Sequence[Arrays], rank: int, size: int, required: I64) -> Arrays:
    """The rows of one of ``size`` ranks, out of the states of those that had them.

    Args:
        parts: What :meth:`smes.model.id_table.IdTable.state_view` gives, of each rank, in their order. Not changed.
        rank, size: Of the rank that needs its rows.
        required: int64, the keys of the rows that every table has (:attr:`smes.model.ids.IdKeys.required`).

    Returns:
        What :meth:`smes.model.id_table.IdTable.load_state` takes. What became of rows that were given back is counted
        by rank 0, so that the sums over all ranks stay.

    Raises:
        KeyError: An array is missing.
        ValueError: The states do not fit together, or have an array of which nobody knows here what it means.
    """
    names = _names(parts)
    used = [_used_rows(part) for part in parts]
    owners = [owner_of(part[_KEYS][rows], size) for part, rows in zip(parts, used, strict=True)]
    kept = [rows[owner == rank] for rows, owner in zip(used, owners, strict=True)]
    share: Arrays = {
        name: np.concatenate([part[name][rows] for part, rows in zip(parts, kept, strict=True)])
        for name in _BY_ROW
        if name in names
    }
    share[_FREE] = np.zeros(0, np.int64)
    is_of_id = [~np.isin(part[_KEYS][rows], required) for part, rows in zip(parts, used, strict=True)]
    share[_COUNTS] = _counts(parts, np.concatenate(owners)[np.concatenate(is_of_id)], rank, size)
    if _CLOCK in names:
        clocks = np.stack([part[_CLOCK] for part in parts])
        share[_CLOCK] = np.array([clocks[:, 0].max(), clocks[:, 1].min()])
        share[_RECENT] = _recent(parts, kept)
    if _COUNTERS in names:
        share[_COUNTERS] = np.max([part[_COUNTERS] for part in parts], axis=0)
        share[_COUNTED] = np.array([sum(int(part[_COUNTED][0]) for part in parts) // size])
    return share


def _names(parts: Sequence[Arrays]) -> set[str]:
    """The arrays that every part has."""
    names = {name for name in parts[0] if not name.startswith(_SEARCHES)}
    for part in parts:
        other = {name for name in part if not name.startswith(_SEARCHES)}
        if unlike := sorted((names ^ other) | (other - _KNOWN)):
            raise ValueError(f"rows of the id table of {len(parts)} ranks: arrays {unlike} are unknown or not of all")
    return names


def _used_rows(part: Arrays) -> I64:
    used = np.ones(len(part[_KEYS]), np.bool_)
    used[part[_FREE]] = False
    return np.flatnonzero(used)


def _counts(parts: Sequence[Arrays], owners: I64, rank: int, size: int) -> I64:
    """Born, expired, replaced and turned away: of rank 0 all that there was, less what the others have in use."""
    in_use = np.bincount(owners, minlength=size)
    counts = np.zeros_like(parts[0][_COUNTS])
    if rank:
        counts[_BORN] = in_use[rank]
        return counts
    counts += np.sum([part[_COUNTS] for part in parts], axis=0)
    counts[_BORN] -= in_use[1:].sum()
    return counts


def _recent(parts: Sequence[Arrays], kept: Sequence[I64]) -> I64:
    """The rows of the batch before: where those that are kept lie now."""
    found, start = [], 0
    for part, rows in zip(parts, kept, strict=True):
        found.append(start + np.flatnonzero(np.isin(rows, part[_RECENT])))
        start += len(rows)
    return np.concatenate(found)
