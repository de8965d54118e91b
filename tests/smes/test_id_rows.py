"""Rows by id: which ids have one, when rows are given back, and what a batch reads. References are dictionaries."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smes.arrays import I64
from smes.model.admission import Sightings
from smes.model.id_rows import BatchRows, IdRows
from smes.model.id_rows_kernels import distinct, not_among, not_seen_since, oldest
from smes.model.ids import IdKeys, pool_weights, uniform_rows
from smes.model.rows_config import RowCounts, RowRules, RowsConfig
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
_VOCABULARY = ["user_id", "item_id", "people", "people", "people", "people"]
_START_S = 1_700_000_000


def _ids(*rows: list[int]) -> I64:
    return np.array(rows, np.int64)


def _rows(batch: BatchRows) -> list[list[int]]:
    """The row of each cell."""
    rows: list[list[int]] = batch.rows_U[batch.cells_BW].tolist()
    return rows


def _has_row(rows: IdRows, *ids: int) -> list[bool]:
    """Which users have a row of their own."""
    found = rows.find(_ids(*([user, 0, 0, MISSING, MISSING, MISSING] for user in ids)))[:, 0]
    return [row not in rows.required.tolist() for row in found]


def _see(rows: IdRows, second: int, *users: int) -> BatchRows:
    """A batch of these users, and nothing else."""
    return rows.assign(_ids(*([user] + 5 * [MISSING] for user in users)), 1000 * (_START_S + second))


def test_equal_ids_share_a_row_only_within_a_vocabulary() -> None:
    rows = IdRows(_SCHEMA)
    batch = rows.assign(_ids([7, 7, 7, 7, 8, MISSING], [9, 7, MISSING, MISSING, MISSING, MISSING]), 0)
    got = _rows(batch)
    assert got[0][2] == got[0][3], "author and seen_authors share a vocabulary"
    assert len({got[0][0], got[0][1], got[0][2]}) == 3, "user 7, item 7 and person 7 are three"
    assert got[1][1] == got[0][1]
    assert got[0][5] == got[1][2] == 2, "absent reads the vocabulary's default row"
    assert len(rows) == 3 + 5  # three defaults; user 7, item 7, person 7, person 8, user 9
    assert batch.born.tolist() == [3, 4, 5, 6, 7]


def test_unknown_ids_read_the_default_row_and_are_not_added() -> None:
    rows = IdRows(_SCHEMA)
    rows.assign(_ids([1, 1, 1, 1, 1, 1]), 0)
    before = len(rows)
    assert rows.find(_ids([1, 2, 2, 1, 2, MISSING])).tolist() == [[3, 1, 2, 5, 2, 2]]
    assert len(rows) == before


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=6, max_size=6), min_size=1, max_size=40))
def test_rows_equal_those_of_a_dictionary_and_survive_a_restart(ids: list[list[int]]) -> None:
    expected: dict[tuple[str, int], int] = {("user_id", MISSING): 0, ("item_id", MISSING): 1, ("people", MISSING): 2}
    wanted = [
        [expected.setdefault((v, i), len(expected)) for v, i in zip(_VOCABULARY, row, strict=True)] for row in ids
    ]
    rows, half = IdRows(_SCHEMA), len(ids) // 2
    if half:
        assert _rows(rows.assign(_ids(*ids[:half]), 0)) == wanted[:half]
    again = IdRows(_SCHEMA)
    again.load_state(rows.keys(np.arange(rows.num_rows)), rows.state())
    assert _rows(again.assign(_ids(*ids[half:]), 0)) == wanted[half:]
    assert len(again) == again.num_rows == len(expected)


def test_keys_of_another_schema_are_refused() -> None:
    other = IdRows(Schema("other", tasks=(Task("click"),)))
    with pytest.raises(ValueError, match="expected the schema and the shared_rows"):
        IdRows(_SCHEMA).load_state(other.keys(np.arange(other.num_rows)), other.state())


def test_rules_for_an_unknown_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows\.vocabularies\.author: .*expected one of user_id, item_id, people"):
        IdRows(_SCHEMA, RowsConfig(vocabularies={"author": RowRules(admit_after=2)}))


# Admission


def test_an_id_gets_its_row_in_the_batch_of_its_nth_sighting() -> None:
    rows = IdRows(_SCHEMA, RowsConfig(admit_after=3, vocabularies={"item_id": RowRules()}))
    first = rows.assign(_ids([5, 6, 7, 7, MISSING, MISSING]), 0)
    assert _rows(first) == [[0, 3, 2, 2, 2, 2]], "the item has no wait; the author was seen twice"
    assert first.born.tolist() == [3]
    second = rows.assign(_ids([5, 6, MISSING, MISSING, MISSING, 7]), 0)
    assert _rows(second) == [[0, 3, 2, 2, 2, 4]], "the author's third sighting, in whatever column"
    assert _rows(rows.assign(_ids([5, 8, 7, 7, 9, 9]), 0)) == [[5, 6, 4, 4, 2, 2]]
    assert rows.find(_ids([5, 8, 9, 7, 10, 9])).tolist() == [[5, 6, 2, 4, 2, 2]], "looking up counts no sighting"


def test_ids_without_a_row_share_a_few() -> None:
    rows = IdRows(_SCHEMA, RowsConfig(admit_after=2, shared_rows=4, vocabularies={"people": RowRules(admit_after=2)}))
    ids = np.column_stack([np.arange(1000), np.arange(1000), np.arange(1000), *np.full((3, 1000), MISSING)])
    batch = rows.assign(ids, 0)
    read = batch.rows_U[batch.cells_BW]
    users, items = read[:, 0], read[:, 1]
    assert len(batch.born) == 0
    assert len(set(users)) == len(set(items)) == 4, "default rows are not among them"
    assert not set(users) & set(items), "each vocabulary has its own"
    assert np.bincount(users).max() < 350, "spread by their hash"
    assert set(read[:, 2]) == {2}, "the people's default row"
    assert np.array_equal(read[:, :3], rows.find(ids)[:, :3])
    assert len(rows) == 3 + 2 * 4
    keys = IdKeys(_SCHEMA, [4, 4, 0])
    expected = rows.keys(read.ravel()).reshape(read.shape)
    shared = keys.shared(keys.own(ids), np.arange(ids.size)).reshape(ids.shape)
    assert np.array_equal(shared[:, :3], expected[:, :3]), "a reader of the keys finds the same rows"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=30), min_size=1, max_size=20), st.integers(1, 60))
def test_sightings_are_those_of_a_dictionary_as_long_as_they_are_remembered(
    batches: list[list[int]], seed: int
) -> None:
    sightings, counts = Sightings(1000), dict[int, int]()
    for batch in batches:
        keys, times = np.unique(np.array(batch, np.int64) * seed, return_counts=True)
        got = sightings.add(keys, times.astype(np.int64))
        for key, n in zip(keys.tolist(), times.tolist(), strict=True):
            counts[key] = counts.get(key, 0) + n
        assert got.tolist() == [min(255, counts[key]) for key in keys.tolist()]
        again = Sightings(1000)
        again.load_state(sightings.state())
        sightings = again


def test_counts_are_never_too_small_and_seldom_too_large() -> None:
    """As many ids as are remembered, each seen once; then those of the generation before are still known."""
    remembered = 20_000
    sightings = Sightings(remembered)
    keys = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 3 * remembered)
    ones = np.ones(100, np.int64)
    too_large = [
        int((sightings.add(keys[start : start + 100], ones) > 1).sum()) for start in range(0, 2 * remembered, 100)
    ]
    assert sum(too_large) / (2 * remembered) < 0.02
    counts = sightings.add(keys[remembered : 2 * remembered], np.ones(remembered, np.int64))
    assert counts.min() >= 2
    for start in range(2 * remembered, 3 * remembered, 100):
        sightings.add(keys[start : start + 100], ones)
    counts = sightings.add(keys[:remembered], np.ones(remembered, np.int64))
    assert (counts == 1).mean() > 0.9, "two generations ago: forgotten"
    assert sightings.state()["counters"].nbytes <= 32 * remembered


# Giving rows back


def test_a_budget_gives_the_row_of_the_least_recently_seen_id_to_a_new_one() -> None:
    rows = IdRows(_SCHEMA, RowsConfig(budget=3))
    for second, user in enumerate((1, 2, 3, 1)):
        _see(rows, second, user)
    assert _has_row(rows, 1, 2, 3) == [True, True, True]
    batch = _see(rows, 5, 4)
    assert _has_row(rows, 1, 2, 3, 4) == [True, False, True, True], "2 was seen longest ago"
    assert len(rows) == 3 + 3
    assert rows.num_rows == 6, "the row of 2 is used again"
    assert batch.born.tolist() == [4]
    _see(rows, 6, 5)
    _see(rows, 7, 2)
    assert _has_row(rows, 1, 2, 3, 4, 5) == [False, True, False, True, True]


def test_rows_of_this_batch_and_of_the_one_before_stay() -> None:
    """A device may still train them. Ids that find no room read the default row, and the budget holds."""
    rows = IdRows(_SCHEMA, RowsConfig(budget=3))
    assert _rows(_see(rows, 0, 1, 2, 3, 4, 5))[3:] == [[0, 1, 2, 2, 2, 2]] * 2, "the first three have the rows"
    assert _rows(_see(rows, 0, 6))[0][0] == 0
    assert _has_row(rows, 1, 2, 3, 6) == [True, True, True, False]
    _see(rows, 0, 6)
    assert _has_row(rows, 1, 2, 3, 6) == [False, True, True, True], "two batches later, in the same second"
    assert len(rows) == 6
    assert rows.counts == RowCounts(in_use=3, born=4, expired=0, replaced=1, turned_away=3)


def test_vocabularies_with_rules_of_their_own_have_their_own_budget() -> None:
    config = RowsConfig(budget=4, vocabularies={"people": RowRules(budget=1), "item_id": RowRules()})
    rows = IdRows(_SCHEMA, config)
    for n in range(20):
        rows.assign(_ids([n, n, n, MISSING, MISSING, MISSING]), 1000 * n)
        if n > 5:
            assert len(rows) == 3 + 4 + 1 + (n + 1)  # users; people; items
    assert rows.find(_ids([19, 0, 19, 18, MISSING, MISSING]))[0, 1] not in rows.required


def test_an_id_that_is_not_seen_expires_by_event_time() -> None:
    rows = IdRows(_SCHEMA, RowsConfig(expire_after_s=640, vocabularies={"item_id": RowRules()}))
    rows.note_removed()
    for second in range(0, 1400, 5):
        _see(rows, second, *([1, 2] if second < 100 else [1]))
        assert _has_row(rows, 1) == [True]
        if second <= 95 + 640 or second > 95 + 655:  # in between it goes
            assert _has_row(rows, 2) == [second <= 95 + 640]
    removed = rows.take_removed()
    assert removed.tolist() == IdKeys(_SCHEMA).own(_ids([2, 0, 0, 0, 0, 0]))[:1].tolist()
    assert rows.take_removed().tolist() == []


def test_late_events_do_not_turn_the_clock_back() -> None:
    rows = IdRows(_SCHEMA, RowsConfig(expire_after_s=100))
    _see(rows, 1000, 1)
    _see(rows, 10, 2)
    _see(rows, 1080, 3)
    assert _has_row(rows, 1, 2, 3) == [True, True, True], "2 counts as seen at second 1000"


class NaiveRows:
    """Which users have rows, from the documentation of the configuration alone."""

    def __init__(self, admit_after: int, budget: int, expire_after_s: int) -> None:
        self.admit_after, self.budget, self.expire_after_s = admit_after, budget, expire_after_s
        self.seen: dict[int, int] = {}  # users with rows, and when they were last seen
        self.counts: dict[int, int] = {}
        self.before: set[int] = set()

    def check(self, rows: IdRows, users: list[int], second: int, next_check: int) -> None:
        """See a batch, and compare."""
        _see(rows, second, *users)
        has = dict(zip(self.everyone(users), _has_row(rows, *self.everyone(users)), strict=True))
        if second >= next_check:
            for user in [u for u, s in self.seen.items() if s <= second - self.expire_after_s and u not in self.before]:
                del self.seen[user]
        wanted = []
        for user in dict.fromkeys(users):
            if user not in self.seen:
                self.counts[user] = self.counts.get(user, 0) + users.count(user)
                if self.counts[user] >= self.admit_after:
                    wanted.append(user)
        needed = self.before | {user for user in users if user in self.seen}
        missing = len(self.seen) + len(wanted) - self.budget
        went = [user for user in self.seen if not has[user]]
        may_go = [user for user in self.seen if user not in needed]
        assert len(went) == min(max(missing, 0), len(may_go))
        assert set(went) <= set(may_go)
        stays = [self.seen[user] for user in may_go if user not in went]
        assert not went or not stays or max(self.seen[user] for user in went) <= min(stays), "the oldest went"
        for user in went:
            del self.seen[user]
        admitted = wanted[: self.budget - len(self.seen)]
        assert [user for user in wanted if has[user]] == admitted
        self.seen |= dict.fromkeys(admitted, second)
        self.seen |= {user: second for user in users if user in self.seen}
        self.before = set(users)
        assert {user for user in has if has[user]} == set(self.seen)

    def everyone(self, users: list[int]) -> list[int]:
        return sorted({*self.seen, *self.counts, *users})


@pytest.mark.parametrize("seed", range(6))
def test_rows_live_and_go_as_a_dictionary_says(seed: int) -> None:
    """Admission, budget and expiry together, over 400 random batches and a few restarts."""
    rng = np.random.default_rng(seed)
    admit_after, budget, expire_after_s = int(rng.integers(1, 4)), int(rng.integers(5, 60)), int(rng.integers(10, 400))
    config = RowsConfig(
        admit_after=admit_after, vocabularies={"user_id": RowRules(admit_after, 2, expire_after_s, budget)}
    )
    rows, naive = IdRows(_SCHEMA, config), NaiveRows(admit_after, budget, expire_after_s)
    second, next_check, every = 0, 0, max(1, expire_after_s // 64)
    for step in range(400):
        second += int(rng.integers(0, 4)) if rng.random() < 0.95 else int(rng.integers(0, 2 * expire_after_s))
        users = (rng.zipf(1.3, int(rng.integers(1, 25))).clip(1, 200) + step // 4).tolist()
        if step == 0:
            next_check = second + every
        naive.check(rows, users, second, next_check)
        if second >= next_check:
            next_check = second + every
        counts = rows.counts
        assert counts.in_use == len(rows) - len(rows.required) == counts.born - counts.expired - counts.replaced
        if step % 90 == 70:
            again = IdRows(_SCHEMA, config)
            keys, used = rows.view().block(0, rows.num_rows)
            assert used.sum() == len(rows)
            again.load_state(keys, rows.state())
            rows = again
    assert rows.counts.born > rows.counts.replaced > 0


def test_rows_of_a_checkpoint_without_ages_count_as_seen_when_the_first_batch_comes() -> None:
    """The options may be turned on later: rows of before them follow the common rules until their ids are seen."""
    before = IdRows(_SCHEMA)
    _see(before, 0, *range(1, 11))
    rows = IdRows(_SCHEMA, RowsConfig(expire_after_s=100, vocabularies={"user_id": RowRules(expire_after_s=1000)}))
    rows.load_state(before.keys(np.arange(before.num_rows)), before.state())
    _see(rows, 5000, 1)
    _see(rows, 5090, 2)
    assert all(_has_row(rows, *range(1, 11)))
    _see(rows, 5110, 99)
    _see(rows, 5120, 99)
    assert _has_row(rows, *range(1, 11)) == [True, True] + 8 * [False], "1 and 2 are known to be users by now"
    limited = IdRows(_SCHEMA, RowsConfig(budget=4))
    limited.load_state(before.keys(np.arange(before.num_rows)), before.state())
    _see(limited, 5000, 99)
    assert len(limited) == 3 + 4


# Rates


def test_what_accumulators_keep_and_rates_follow_time_and_frequency() -> None:
    rows = IdRows(_SCHEMA, half_life_s=10.0, frequency_power=0.5)
    kept = {}
    for second, users in ((0, [1, 2]), (10, [1]), (10, [1]), (40, [1, 2])):
        batch = _see(rows, second, *users)
        assert batch.keep_U is not None
        assert batch.rate_U is not None
        places = batch.cells_BW[:, 0]
        kept[second] = [round(float(x), 6) for x in (*batch.keep_U[places], *batch.rate_U[places])]
    assert kept == {
        0: [1, 1, 1, 1],
        10: [1, 0.57735],  # again in the same second; the third batch: 3^-0.5
        40: [0.125, 0.0625, 0.5, 0.707107],
    }
    assert IdRows(_SCHEMA).assign(_ids([1] * 6), 0).keep_U is None


# Loops


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(-5000, 5000), min_size=4, max_size=4), min_size=1, max_size=30))
def test_distinct_values_rebuild_the_batch(batch: list[list[int]]) -> None:
    values = _ids(*batch).ravel()
    found, place, times, first = distinct(values)
    assert found.tolist() == list(dict.fromkeys(values.tolist()))
    assert np.array_equal(found[place], values)
    assert times.tolist() == [values.tolist().count(value) for value in found]
    assert first.tolist() == [values.tolist().index(value) for value in found]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-9, 9)), st.lists(st.integers(-9, 9)))
def test_not_among_is_numpys_isin(values: list[int], others: list[int]) -> None:
    a, b = np.array(values, np.int64), np.array(others, np.int64)
    assert np.array_equal(not_among(a, b), ~np.isin(a, b))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 30), st.integers(1, 2**17), st.data())
def test_the_oldest_rows_are_those_of_a_sort(start: int, count: int, spread: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(0, 40))
    rng = np.random.default_rng(data.draw(st.integers(0, 100)))
    seen_s = (start + rng.integers(0, spread, n)).clip(0, 2**32 - 1).astype(np.uint32)
    vocabulary = rng.integers(-1, 3, n).astype(np.int16)
    in_pool = np.array([True, False, True])
    members = [row for row in range(n) if vocabulary[row] >= 0 and in_pool[vocabulary[row]]]
    expected = sorted(sorted(members, key=lambda row: (seen_s[row], row))[:count])
    assert oldest(seen_s, vocabulary, in_pool, count).tolist() == expected
    limits = np.array([-1, start, start + spread // 2], np.int64)
    late = [row for row in range(n) if vocabulary[row] >= 0 and int(seen_s[row]) <= limits[vocabulary[row]]]
    assert not_seen_since(seen_s, vocabulary, limits).tolist() == late


# Features


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
