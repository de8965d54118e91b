"""IdMap compared with a dict and a list of free rows, step by step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
