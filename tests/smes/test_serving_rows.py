"""The scorer's table gives the rows of each version, whatever was folded by then."""

from collections.abc import Mapping

import numpy as np
import pytest

from smes.arrays import F32, I64
from smes.model.deltas import RowDelta
from smes.model.ids import IdKeys
from smes.model.serving_rows import ServingTable, Shadow, TableRows
from smes.reserved import SMALL_BYTES
from smes.schema import MISSING, Feature, Schema, Task

SCHEMA = Schema("rows", tasks=(Task("click"), Task("like")), features=(Feature("author", "id"),))  # user, item, author
GROUPS = {"embedding": 5, "wide": 2}

Rows = dict[int, F32]
"""Key → the weights of all groups side by side: the naive table."""


def keys_of(shared_rows: int = 0) -> IdKeys:
    return IdKeys(SCHEMA, [shared_rows] * 3)


def made_rows(rng: np.random.Generator, keys: I64) -> Rows:
    return {int(key): rng.normal(size=sum(GROUPS.values())).astype(np.float32) for key in keys}


def columns_of(rows: Rows) -> tuple[I64, dict[str, F32]]:
    values = np.stack(list(rows.values())) if rows else np.zeros((0, sum(GROUPS.values())), np.float32)
    ends = np.cumsum([0, *GROUPS.values()])
    columns = {name: values[:, a:b] for name, a, b in zip(GROUPS, ends, ends[1:], strict=False)}
    return np.array(list(rows), np.int64), columns


def own_table(rows: TableRows) -> ServingTable:
    assert isinstance(rows.table, ServingTable)
    return rows.table


def table_of(rows: Rows, *, expected: int | None = None) -> ServingTable:
    table = ServingTable(GROUPS, len(rows) if expected is None else expected)
    table.add(*columns_of(rows))
    return table


def delta_of(changed: Rows, removed: list[int]) -> RowDelta:
    keys, columns = columns_of(changed)
    return RowDelta(keys, columns, np.array(removed, np.int64))


def assert_reads(rows: TableRows, naive: Rows, ids_NW: I64) -> None:
    """The table gives what a dictionary gives: an id's own row, or that which ids without one share."""
    own = rows.keys.own(ids_NW)
    shared = rows.keys.shared(own, np.arange(ids_NW.size))
    expected = np.stack([naive.get(int(a), naive[int(b)]) for a, b in zip(own, shared, strict=True)])
    read = rows.read(ids_NW)
    got = np.concatenate([read[name].numpy().reshape(len(own), -1) for name in GROUPS], axis=1)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("shared_rows", [0, 3])
@pytest.mark.parametrize("seed", range(4))
def test_every_version_reads_as_a_dictionary_does(seed: int, shared_rows: int) -> None:
    """Versions of random births, changes and removals, folded at random; the table begins too small for them."""
    rng, keys = np.random.default_rng(seed), keys_of(shared_rows)
    naive = made_rows(rng, keys.required)
    rows = TableRows(keys, table_of(naive, expected=0))
    ids = np.arange(3000).reshape(-1, 3)
    usable = np.unique(keys.own(ids))

    for version in range(1, 120):
        changed = made_rows(rng, rng.choice(usable, rng.integers(0, 200), replace=False))
        gone = set(rng.choice(usable, rng.integers(0, 150), replace=False).tolist()) - changed.keys()
        delta = delta_of(changed, sorted(gone))
        naive = {key: row for key, row in naive.items() if key not in gone} | changed
        rows = rows.after(Shadow(delta, version, GROUPS)).with_fewer_shadows(4)
        if rng.random() < 0.6:
            rows = rows.folded(version - int(rng.integers(0, 3)))
        asked = rng.integers(-5, 1100, (40, 3))
        asked[rng.random((40, 3)) < 0.1] = MISSING
        assert_reads(rows, naive, asked)

    rows = rows.folded(version)
    assert rows.shadows == ()
    assert rows.table.num_rows == len(naive)
    assert_reads(rows, naive, ids)


def test_an_earlier_version_reads_its_own_rows_until_it_is_folded() -> None:
    rng, keys = np.random.default_rng(0), keys_of()
    ids = np.arange(30).reshape(10, 3)
    first = made_rows(rng, np.concatenate([keys.required, keys.own(ids)]))
    base = TableRows(keys, table_of(first))
    second = first | made_rows(rng, keys.own(ids)[:7])
    gone = int(keys.own(ids)[8])
    third = {key: row for key, row in second.items() if key != gone}

    after_one = base.after(
        Shadow(delta_of({k: second[k] for k in list(second) if second[k] is not first[k]}, []), 1, GROUPS)
    )
    after_two = after_one.after(Shadow(delta_of({}, [gone]), 2, GROUPS))
    assert_reads(base, first, ids)
    assert_reads(after_one, second, ids)
    assert_reads(after_two, third, ids)

    folded = after_two.folded(1)
    assert_reads(after_one, second, ids)
    assert_reads(after_two, third, ids)
    assert_reads(folded, third, ids)
    assert_reads(folded.folded(2), third, ids)


def test_rows_in_reserved_memory_and_maps_that_grow_keep_every_row() -> None:
    rng, keys = np.random.default_rng(1), keys_of()
    naive = made_rows(rng, keys.required)
    rows = TableRows(keys, table_of(naive))
    ids = np.arange(60_000).reshape(-1, 3)
    for version, part in enumerate(np.array_split(ids, 20)):
        born = made_rows(rng, keys.own(part))
        naive |= born
        rows = rows.after(Shadow(delta_of(born, []), version, GROUPS)).folded(version)

    assert rows.table.num_rows == len(naive) == 60_003
    assert own_table(rows).nbytes > 2 * SMALL_BYTES
    assert own_table(rows).nbytes < 1.35 * (8 + 4 * sum(GROUPS.values())) * len(naive)
    assert_reads(rows, naive, ids)


def test_rows_of_removed_keys_are_used_again() -> None:
    rng, keys = np.random.default_rng(2), keys_of()
    rows = TableRows(keys, table_of(made_rows(rng, keys.required)))
    before = 0
    for version in range(200):
        ids = np.arange(version * 300, version * 300 + 300).reshape(-1, 3)
        born = made_rows(rng, keys.own(ids))
        gone = [] if version == 0 else keys.own(ids - 300).tolist()
        rows = rows.after(Shadow(delta_of(born, gone), version, GROUPS)).folded(version)
        before = before or own_table(rows).nbytes

    assert rows.table.num_rows == 303
    assert own_table(rows).nbytes < 2 * before


def with_value(rows: Rows, value: float) -> Rows:
    key = next(iter(rows))
    return rows | {key: np.full_like(rows[key], value)}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(value: float) -> None:
    rows = with_value(made_rows(np.random.default_rng(0), np.arange(5)), value)
    with pytest.raises(ValueError, match=r"tensor table\.embedding: 5 values are NaN or infinite"):
        table_of(rows)
    with pytest.raises(ValueError, match=r"tensor table\.embedding: 5 values are NaN or infinite"):
        Shadow(delta_of(rows, []), 1, GROUPS)


def test_a_key_that_comes_twice_is_refused() -> None:
    rows = made_rows(np.random.default_rng(0), np.arange(5))
    table = table_of(rows)
    with pytest.raises(ValueError, match="keys of a table: 0 occurs twice"):
        table.add(*columns_of(rows))
    with pytest.raises(ValueError, match="keys of a delta: 3 occurs twice"):
        Shadow(delta_of(rows, [3]), 1, GROUPS)


@pytest.mark.parametrize(
    "columns",
    [{}, {"embedding": (5, 5)}, {"embedding": (5, 5), "wide": (5, 3)}, {"embedding": (4, 5), "wide": (5, 2)}],
)
def test_columns_of_another_table_are_refused(columns: Mapping[str, tuple[int, int]]) -> None:
    values = {name: np.zeros(shape, np.float32) for name, shape in columns.items()}
    with pytest.raises(ValueError, match="columns of table rows"):
        ServingTable(GROUPS).add(np.arange(5), values)
    with pytest.raises(ValueError, match="columns of table rows"):
        Shadow(RowDelta(np.arange(5), values, np.zeros(0, np.int64)), 1, GROUPS)


def test_a_table_of_more_rows_than_a_slot_can_name_is_refused_before_anything_is_allocated() -> None:
    with pytest.raises(ValueError, match="a table of 10000000000000 rows, expected at most 2147483648"):
        ServingTable(GROUPS, 10**13)
