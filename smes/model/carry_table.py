"""The id table across a change of the schema: the rows of ids go on, under the keys of their new vocabularies.

Rows keep their places. Rows of a vocabulary that is gone are given back. Where two vocabularies become one, an id that
both know keeps the row of the vocabulary that has the name of the new one, or else the row of that which came first.
A loaded row whose id was not seen since is of no known vocabulary: it stays as it is.

Letters: R rows, N some of them, V vocabularies, T tasks, X floats of a record.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smes.arrays import F32, I64, Arrays, prefixed, under
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.id_rows import UNKNOWN
from smes.model.ids import IdKeys, ids_of, keys_of, uniform_rows
from smes.model.rows_config import RowsConfig
from smes.model.table_layout import RecordLayout, column_groups
from smes.schema import Schema
from smes.schema_change import SchemaChange

_NOBODY = -1  # as in row_ages


@dataclass(frozen=True)
class TableRules:
    """What the table of the new schema is made by; see :class:`smes.model.id_table.IdTable`."""

    model: ModelConfig
    optimizer: OptimizerConfig
    rows: RowsConfig
    seed: int

    def layout(self, num_tasks: int) -> RecordLayout:
        """Of the records."""
        return RecordLayout(column_groups(self.model, self.optimizer, num_tasks))

    def keys(self, schema: Schema) -> IdKeys:
        """Of the ids."""
        names = list(dict.fromkeys(f.vocabulary_name for f in schema.inputs.id_features))
        return IdKeys(schema, [rule.shared_rows for rule in self.rows.rules(names)])


def carried_table(state: Arrays, shared_rows_V: I64, change: SchemaChange, rules: TableRules) -> Arrays:
    """The table's part of a learner's state under the new schema.

    Args:
        state: ``table.keys``, ``table.records`` and ``rows.*``, under the schema before.
        shared_rows_V: int64, how many shared rows each vocabulary had.
        change: Of the model's inputs.
        rules: Of the new table.

    Raises:
        ValueError: The records are of another schema or model.
    """
    rows = under("rows.", state)
    records: F32 = state["table.records"]
    was_keys, now_keys = IdKeys(change.was, shared_rows_V), rules.keys(change.now)
    keys_R, vocabulary_R, used_R = _carried_keys(state["table.keys"], rows, was_keys, now_keys, change)
    kept = len(keys_R)
    missing = now_keys.required[~np.isin(now_keys.required, keys_R[used_R])]
    keys = np.concatenate([np.where(used_R, keys_R, 0), missing])
    freed = np.setdiff1d(np.flatnonzero(~used_R), rows["free"])
    counts = rows["counts"] - np.array(
        [len(freed) - np.isin(state["table.keys"][freed], was_keys.required).sum(), 0, 0, 0]
    )
    out: Arrays = {
        "table.keys": keys,
        "table.records": np.concatenate(
            [
                _carried_records(
                    records, rules.layout(change.was.num_tasks), rules.layout(change.now.num_tasks), change
                ),
                _first_records(missing, rules, change.now.num_tasks),
            ]
        ),
        "rows.free": np.concatenate([rows["free"], freed]),
        "rows.counts": counts,
        "rows.vocabulary": np.concatenate([vocabulary_R, np.full(len(missing), UNKNOWN, np.int16)]),
    }
    out |= prefixed("rows.sightings.", under("sightings.", rows))
    if "ages.clock" in rows:
        ages = under("ages.", rows)
        number = _numbers(was_keys, now_keys, change)  # of vocabularies; then that of rows of unknown ones
        of_rows = np.append(number, len(now_keys.vocabularies))[ages["vocabulary"]]
        of_rows[(ages["vocabulary"] == _NOBODY) | ~used_R] = _NOBODY
        out |= {
            "rows.ages.clock": ages["clock"],
            "rows.ages.recent": ages["recent"][used_R[ages["recent"]]],
            "rows.ages.seen_s": _longer(ages["seen_s"], len(keys), int(ages["clock"][0])),
            "rows.ages.vocabulary": _longer(of_rows.astype(np.int16), len(keys), _NOBODY),
        }
        if "batches" in ages:
            out["rows.ages.batches"] = _longer(ages["batches"], len(keys), 0)
    assert len(vocabulary_R) == kept == len(records), "rows keep their places"
    return out


def _numbers(was: IdKeys, now: IdKeys, change: SchemaChange) -> I64:
    """Number of each old vocabulary in the new schema, -1 for those that are gone. int64 [V]."""
    place = {name: v for v, name in enumerate(now.vocabularies)}
    return np.array([place.get(change.vocabularies.get(name, ""), _NOBODY) for name in was.vocabularies], np.int64)


def _carried_keys(
    keys_R: I64, rows: Arrays, was: IdKeys, now: IdKeys, change: SchemaChange
) -> tuple[I64, NDArray[np.int16], NDArray[np.bool_]]:
    """New keys, new vocabularies, and which rows are in use; of the old rows."""
    used_R = np.ones(len(keys_R), np.bool_)
    used_R[rows["free"]] = False
    keys_R, number = keys_R.copy(), _numbers(was, now, change)
    required_R = np.isin(keys_R, was.required) & used_R
    vocabulary_R: NDArray[np.int16] = np.where(required_R | ~used_R, UNKNOWN, rows["vocabulary"]).astype(np.int16)
    old_of = vocabulary_R.copy()
    order = [v for v, name in enumerate(was.vocabularies) if change.vocabularies.get(name) == name]
    order += [v for v in range(len(was.vocabularies)) if v not in order]
    required = _required_by_vocabulary(was)
    wins: dict[int, int] = {}  # new vocabulary → the old one whose required rows it takes
    rank_R = np.full(len(keys_R), len(order), np.int64)
    for rank, v in enumerate(order):
        mine, new = np.flatnonzero(old_of == v), int(number[v])
        of_all = np.flatnonzero(required_R & np.isin(keys_R, required[v]))
        if new == _NOBODY:
            used_R[mine] = used_R[of_all] = False
            continue
        name_was, name_now = was.vocabularies[v], now.vocabularies[new]
        if name_was != name_now or name_was == change.outcomes_vocabulary:
            ids = ids_of(keys_R[mine], name_was)
            keys_R[mine] = keys_of(change.outcomes(ids) if name_was == change.outcomes_vocabulary else ids, name_now)
        rank_R[mine], vocabulary_R[mine] = rank, new
        if wins.setdefault(new, v) != v:
            used_R[of_all] = False
            continue
        goes_on = _required_by_vocabulary(now)[new]
        for place, key in enumerate(required[v]):
            at = of_all[keys_R[of_all] == key]
            if place < len(goes_on):
                keys_R[at] = goes_on[place]
            else:
                used_R[at] = False
    return keys_R, _without(vocabulary_R, used_R), _one_each(keys_R, used_R, rank_R, required_R)


def _without(vocabulary_R: NDArray[np.int16], used_R: NDArray[np.bool_]) -> NDArray[np.int16]:
    vocabulary_R[~used_R] = UNKNOWN
    return vocabulary_R


def _one_each(keys_R: I64, used_R: NDArray[np.bool_], rank_R: I64, required_R: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which rows stay in use where several have one key: the required one, else the one of the least rank."""
    rows = np.flatnonzero(used_R)
    rows = rows[np.lexsort((rows, np.where(required_R[rows], -1, rank_R[rows])))]
    _, first = np.unique(keys_R[rows], return_index=True)
    stays = np.zeros(len(keys_R), np.bool_)
    stays[rows[first]] = True
    return stays


def _required_by_vocabulary(keys: IdKeys) -> list[I64]:
    """The keys of each vocabulary's default row and shared rows."""
    V = len(keys.vocabularies)
    ends = V + np.cumsum(keys.shared_rows)
    shared = [keys.required[end - count : end] for end, count in zip(ends, keys.shared_rows, strict=True)]
    return [np.concatenate([keys.required[v : v + 1], shared[v]]) for v in range(V)]


def _carried_records(records_RX: F32, was: RecordLayout, now: RecordLayout, change: SchemaChange) -> F32:
    if records_RX.shape[1:] != (was.width,):
        raise ValueError(f"table.records: {records_RX.shape[1:]} floats, expected {was.width}: of another model")
    out = np.zeros((len(records_RX), now.width), np.float32)
    for name, place in now.places.items():
        before = was.places[name]
        pairs = ((before.weights, place.weights, 0.0), (before.accumulators, place.accumulators, None))
        for old, new, fill in pairs:
            first = place.group.config.initial_accumulator if fill is None else fill
            columns = records_RX[:, old]
            by_task = name == "wide"
            out[:, new] = change.by_task(columns, first) if by_task else columns
    return out


def _first_records(keys_N: I64, rules: TableRules, num_tasks: int) -> F32:
    layout = rules.layout(num_tasks)
    out = np.zeros((len(keys_N), layout.width), np.float32)
    scale = {"embedding": rules.model.embedding_scale, "wide": 0.0}
    for name, place in layout.places.items():
        out[:, place.weights] = uniform_rows(keys_N, place.group.columns, scale[name], rules.seed)
        out[:, place.accumulators] = place.group.config.initial_accumulator
    return out


def _longer(array: NDArray[np.generic], rows: int, fill: int) -> NDArray[np.generic]:
    return np.concatenate([array, np.full(rows - len(array), fill, array.dtype)])
