"""What lies between two versions: rows and dense weights, against a naive count."""

import numpy as np
import pytest
import torch

from feature_store.differences import difference, difference_of
from feature_store.snapshots import SnapshotStore
from tests.smes_scorer.chains import Chain


def state(keys: list[int], embedding: list[list[float]], **dense: list[float]) -> dict[str, torch.Tensor]:
    return {
        "table.keys": torch.tensor(keys, dtype=torch.int64),
        "table.embedding": torch.tensor(embedding, dtype=torch.float32).reshape(len(keys), 2),
        **{f"dense.{name}": torch.tensor(values) for name, values in dense.items()},
    }


def test_rows_are_matched_by_key_and_counted() -> None:
    a = state([1, 2, 3], [[1, 1], [2, 2], [3, 3]])
    b = state([9, 3, 2], [[9, 9], [3, 7], [2, 2]])

    found = difference_of(a, b)

    assert (found.rows_before, found.rows_after) == (3, 3)
    assert (found.added, found.removed, found.changed) == (1, 1, 1)
    distance = found.columns["embedding"]  # of key 3: (0, 4) against (3, 3)
    assert distance.rms == pytest.approx((16 / 2) ** 0.5)
    assert distance.largest == 4
    assert distance.relative == pytest.approx(4 / 18**0.5)


def test_one_bit_is_a_change_and_the_sign_of_zero_too() -> None:
    a = state([1, 2, 3], [[1, 1], [0, 0], [5, 5]])
    b = state([1, 2, 3], [[float(np.nextafter(np.float32(1), np.float32(2))), 1], [-0.0, 0], [5, 5]])

    found = difference_of(a, b)

    assert found.changed == 2


def test_dense_weights_are_compared_by_name_and_shape() -> None:
    a = state([], [], tower=[3.0, 4.0], gone=[1.0], shape=[1.0], zero=[0.0])
    b = state([], [], tower=[3.0, 5.0], new=[1.0], shape=[1.0, 2.0], zero=[2.0])

    found = difference_of(a, b)

    assert found.dense["dense.tower"].relative == pytest.approx(1 / 5)
    assert (found.dense["dense.zero"].relative, found.dense["dense.zero"].largest) == (None, 2)
    assert found.dense_other == ("dense.gone", "dense.new", "dense.shape")
    assert found.dense_in_all is not None
    assert found.dense_in_all.rms == pytest.approx(((1 + 4) / 3) ** 0.5)
    assert (found.columns, found.changed) == ({}, 0)


def test_two_versions_of_a_real_learner(store: SnapshotStore) -> None:
    chain = Chain(store)
    chain.publish("full")
    before = chain.learner.serving_state()
    for _ in range(3):
        chain.publish()
    after = chain.learner.serving_state()

    found = difference(store, store.get("a", 1), store.get("a", 4))

    rows = [dict(zip(s["table.keys"].tolist(), s["table.embedding"].tolist(), strict=True)) for s in (before, after)]
    assert found.added == len(rows[1].keys() - rows[0].keys())
    assert found.removed == len(rows[0].keys() - rows[1].keys())
    wide = [dict(zip(s["table.keys"].tolist(), s["table.wide"].tolist(), strict=True)) for s in (before, after)]
    both = rows[0].keys() & rows[1].keys()
    assert found.changed == sum((rows[0][k], wide[0][k]) != (rows[1][k], wide[1][k]) for k in both)
    names = [name for name in before if name.startswith("dense.") and before[name].numel()]
    assert set(found.dense) == set(names)
    for name in names:
        largest = (after[name].double() - before[name].double()).abs().max().item()
        assert found.dense[name].largest == largest
    assert difference(store, store.get("a", 4), store.get("a", 4)).changed == 0
