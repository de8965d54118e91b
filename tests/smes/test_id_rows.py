import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smes.model.ids import DistinctRows, IdRows, pool_weights, readers, uniform_rows
from smes.schema import MISSING, Feature, Schema, Task

_SCHEMA = Schema(
    "ids",
    tasks=(Task("click"),),
    features=(
        Feature("author", vocabulary="people"),
        Feature("seen_authors", kind="bag", vocabulary="people", max_length=3),
        Feature("age", kind="numeric"),
    ),
)
# columns: user_id, item_id, author, seen_authors × 3; default rows: user_id 0, item_id 1, people 2


def _ids(*rows: list[int]) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    return np.array(rows, np.int64)


def test_equal_ids_share_a_row_only_within_a_vocabulary() -> None:
    rows = IdRows(_SCHEMA)
    got = rows.insert(_ids([7, 7, 7, 7, 8, MISSING], [9, 7, MISSING, MISSING, MISSING, MISSING]))
    assert got[0, 2] == got[0, 3], "author and seen_authors share a vocabulary"
    assert len({got[0, 0], got[0, 1], got[0, 2]}) == 3, "user 7, item 7 and person 7 are three"
    assert got[1, 1] == got[0, 1]
    assert got[0, 5] == got[1, 2] == 2, "absent reads the vocabulary's default row"
    assert len(rows) == 3 + 5  # three defaults; user 7, item 7, person 7, person 8, user 9


def test_unknown_ids_read_the_default_row_and_are_not_added() -> None:
    rows = IdRows(_SCHEMA)
    rows.insert(_ids([1, 1, 1, 1, 1, 1]))
    before = len(rows)
    assert rows.find(_ids([1, 2, 2, 1, 2, MISSING])).tolist() == [[3, 1, 2, 5, 2, 2]]
    assert len(rows) == before


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=6, max_size=6), min_size=1, max_size=40))
def test_rows_equal_those_of_a_dictionary_and_survive_a_restart(ids: list[list[int]]) -> None:
    vocabulary = ["user", "item", "people", "people", "people", "people"]
    expected: dict[tuple[str, int], int] = {("user", MISSING): 0, ("item", MISSING): 1, ("people", MISSING): 2}
    wanted = [[expected.setdefault((v, i), len(expected)) for v, i in zip(vocabulary, row, strict=True)] for row in ids]
    rows = IdRows(_SCHEMA)
    half = len(ids) // 2
    if half:
        assert rows.insert(_ids(*ids[:half])).tolist() == wanted[:half]
    rows = IdRows(_SCHEMA, rows.keys().copy())
    assert rows.insert(_ids(*ids[half:])).tolist() == wanted[half:]
    assert len(rows) == len(rows.keys()) == len(expected)


def test_keys_of_another_schema_are_refused() -> None:
    keys = IdRows(Schema("other", tasks=(Task("click"),))).keys()
    with pytest.raises(ValueError, match="expected the default rows"):
        IdRows(_SCHEMA, keys)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5000), min_size=4, max_size=4), min_size=1, max_size=30), st.integers(1, 3))
def test_distinct_rows_rebuild_the_batch(batch: list[list[int]], repeats: int) -> None:
    distinct = DistinctRows()
    rows_BW = _ids(*batch)
    for _ in range(repeats):
        rows_U, cells_BW = distinct(rows_BW, 5001)
        assert len(set(rows_U.tolist())) == len(rows_U)
        assert np.array_equal(rows_U[cells_BW], rows_BW)
        assert set(rows_U.tolist()) == set(rows_BW.ravel().tolist())
        order, start_U = readers(cells_BW, len(rows_U))
        cells_by_row = np.split(order, start_U[1:])
        for row, cells in enumerate(cells_by_row):
            assert cells.tolist() == np.flatnonzero(cells_BW.ravel() == row).tolist()


def test_a_bag_is_the_mean_over_its_ids() -> None:
    weights = pool_weights(
        _SCHEMA,
        _ids(
            [1, 1, 1, 4, 5, MISSING],
            [1, 1, MISSING, MISSING, 9, MISSING],
            [1, 1, 1, MISSING, MISSING, MISSING],
        ),
    )
    assert weights is not None
    assert weights.tolist() == [[1, 1, 1, 0.5, 0.5, 0], [1, 1, 1, 0, 1, 0], [1, 1, 1, 1, 0, 0]]
    assert pool_weights(Schema("plain", tasks=(Task("click"),)), _ids([1, 2])) is None


def test_first_weights_of_two_seeds_have_nothing_in_common() -> None:
    keys = np.arange(20_000, dtype=np.int64)
    one, other = uniform_rows(keys, 2, 0.5, seed=1), uniform_rows(keys, 2, 0.5, seed=2)
    assert np.array_equal(one, uniform_rows(keys, 2, 0.5, seed=1))
    assert abs(np.corrcoef(one[:, 0], other[:, 0])[0, 1]) < 0.03
    assert not np.isin(one[:, 0], other[:, 0]).all(), "the same weights in another order"


def test_first_weights_depend_on_the_key_alone_and_look_uniform() -> None:
    keys = np.arange(20_000, dtype=np.int64)
    weights = uniform_rows(keys, 4, 0.5)
    assert np.array_equal(uniform_rows(keys[::-1].copy(), 4, 0.5)[::-1], weights)
    assert np.abs(weights).max() <= 0.5
    # A uniform distribution in ±0.5: mean 0, variance 1/12; columns and neighbouring keys uncorrelated.
    assert abs(weights.mean()) < 0.005
    assert weights.var() == pytest.approx(1 / 12, rel=0.02)
    assert abs(np.corrcoef(weights.T) - np.eye(4)).max() < 0.03
    assert abs(np.corrcoef(weights[:-1, 0], weights[1:, 0])[0, 1]) < 0.03
