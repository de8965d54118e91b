"""IdMap compared with a dict and a list of free rows, step by step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smes.hashing import GOLDEN, splitmix64
from smes.id_map import ABSENT, IdMap


class NaiveMap:
    def __init__(self) -> None:
        self.rows: dict[int, int] = {}
        self.free: list[int] = []
        self.next_row = 0

    def insert(self, key: int) -> int:
        if key not in self.rows:
            if self.free:
                self.rows[key] = self.free.pop()
            else:
                self.rows[key] = self.next_row
                self.next_row += 1
        return self.rows[key]

    def remove(self, key: int) -> int:
        row = self.rows.pop(key, ABSENT)
        if row != ABSENT:
            self.free.append(row)
        return row


# A narrow range makes collisions and re-insertions common; the extremes are ids like any other.
KEYS = st.one_of(st.integers(0, 40), st.sampled_from([-(2**63), 2**63 - 1, -1]))
STEPS = st.lists(st.tuples(st.sampled_from(["insert", "remove", "find", "save"]), st.lists(KEYS, max_size=30)))


@given(STEPS)
@settings(max_examples=150, deadline=None)
def test_behaves_like_a_dict(steps: list[tuple[str, list[int]]]) -> None:
    naive, fast = NaiveMap(), IdMap(1)
    for operation, keys in steps:
        ids = np.array(keys, np.int64)
        if operation == "insert":
            assert fast.insert(ids).tolist() == [naive.insert(k) for k in keys]
        elif operation == "remove":
            assert fast.remove(ids).tolist() == [naive.remove(k) for k in keys]
        elif operation == "find":
            assert fast.find(ids).tolist() == [naive.rows.get(k, ABSENT) for k in keys]
        else:
            fast = IdMap.from_state(fast.state())
        assert len(fast) == len(naive.rows)
        assert fast.num_rows == naive.next_row
    ids, rows = fast.items()
    assert dict(zip(ids.tolist(), rows.tolist(), strict=True)) == naive.rows


def test_grows_past_its_capacity_and_keeps_every_row() -> None:
    ids = np.random.default_rng(0).permutation(200_000).astype(np.int64) * 1024
    id_map = IdMap(8)

    for part in np.array_split(ids, 37):
        id_map.insert(part)

    assert id_map.find(ids).tolist() == list(range(200_000))
    assert (id_map.find(ids + 1) == ABSENT).all()
    assert (id_map.keys() == ids).all()


def test_from_keys_gives_each_key_its_place_as_row() -> None:
    keys = np.random.default_rng(0).permutation(2000).astype(np.int64)

    assert IdMap.from_keys(keys).find(keys).tolist() == list(range(2000))


def test_from_keys_refuses_a_key_twice() -> None:
    with pytest.raises(ValueError, match="1 of 3 occur twice"):
        IdMap.from_keys(np.array([1, 2, 1], np.int64))


def unscattered(hashes: np.ndarray) -> np.ndarray:
    """The ids that SplitMix64's finaliser maps to these hashes. uint64 → int64."""

    def unshift(x: np.ndarray, bits: int) -> np.ndarray:
        y = x
        for _ in range(64 // bits + 1):
            y = x ^ (y >> np.uint64(bits))
        return y

    inverse = {c: np.uint64(pow(c, -1, 2**64)) for c in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)}
    x = unshift(hashes, 31) * inverse[0x94D049BB133111EB]
    return unshift(unshift(x, 27) * inverse[0xBF58476D1CE4E5B9], 30).view(np.int64)


@pytest.mark.parametrize("spread", ["everywhere", "end", "both ends"])
def test_growth_step_by_step_loses_nothing_wherever_searches_begin(spread: str) -> None:
    """Searches that begin at the end of the table go on at its start, where a growth may have begun to move ids."""
    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 2**64, 12_000, dtype=np.uint64, endpoint=False)
    near = hashes >> np.uint64(16)  # within the last of 2**16 parts of the table
    if spread == "end":
        hashes[::9] = ~near[::9]
    elif spread == "both ends":
        hashes[::18], hashes[9::18] = near[::18], ~near[9::18]
    assert np.array_equal(splitmix64(unscattered(hashes) - GOLDEN.view(np.int64)), hashes)
    naive, fast = NaiveMap(), IdMap(1)
    ids = unscattered(hashes)
    for step in range(400):
        seen = ids[: 30 * (step + 1)]
        new = rng.permutation(np.concatenate([seen[-30:], rng.choice(seen, 10)]))
        assert fast.insert(new).tolist() == [naive.insert(key) for key in new.tolist()]
        gone = rng.choice(seen, int(rng.integers(0, 20)))
        assert fast.remove(gone).tolist() == [naive.remove(key) for key in gone.tolist()]
        if step % 8 == 0:
            assert fast.find(ids).tolist() == [naive.rows.get(key, ABSENT) for key in ids.tolist()]
    assert len(fast) == len(naive.rows)
    assert dict(zip(*(part.tolist() for part in fast.items()), strict=True)) == naive.rows


def test_an_id_takes_few_bytes() -> None:
    id_map = IdMap()
    for part in np.arange(600_000).reshape(-1, 1000):
        id_map.insert(part)
        if len(id_map) > 100_000:
            assert id_map.nbytes < 27 * len(id_map)
    assert id_map.nbytes < 8 * 600_000 + 4 * 2**20 + 1000


def test_a_map_with_few_ids_in_high_rows_survives_a_restart() -> None:
    id_map = IdMap()
    keys = np.arange(1000, dtype=np.int64)
    id_map.insert(keys)
    id_map.remove(keys[:990])
    again = IdMap.from_state(id_map.state())
    assert again.find(keys[985:]).tolist() == id_map.find(keys[985:]).tolist() == [ABSENT] * 5 + [*range(990, 1000)]
