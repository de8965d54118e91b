"""Payloads that make no model are refused, and say why, before anything larger than they are is allocated."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from feature_store.payload import read_payload, write_payload
from smes.errors import SchemaMismatch, SnapshotError
from smes.model.deltas import RowDelta
from smes.model.ids import IdKeys
from smes.model.learner import Learner
from smes.schema import Schema
from smes_scorer.loading import load_table_model
from tests.smes_scorer.chains import SCHEMA, loaded, new_learner
from tests.smes_scorer.made_payloads import delta_payload, full_payload, marks_of

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def learner() -> Learner:
    return new_learner()


def test_a_payload_of_another_schema_is_refused_with_both_hashes(learner: Learner) -> None:
    payload, other = full_payload(learner, 1), Schema(name="other", tasks=SCHEMA.tasks)

    with pytest.raises(SchemaMismatch, match=rf"{SCHEMA.hash} differs .* {other.hash}"):
        load_table_model([read_payload([payload], len(payload))], other)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "model configuration: 'model'"),
        ("{", "model configuration"),
        ('{"colour": 1}', r"ModelConfig\.colour: unknown key"),
        ('{"embedding_dim": 1000000000000}', r"ModelConfig\.embedding_dim: 1000000000000, expected at most"),
        (
            '{"embedding_dim": 8}',
            r"table columns \{'embedding': 4, 'wide': 2\}, expected \{'embedding': 8, 'wide': 2\}",
        ),
    ],
)
def test_a_payload_with_a_wrong_model_configuration_is_refused(
    learner: Learner, model: str | None, message: str
) -> None:
    marks = marks_of(learner, 1)
    del marks["model"]

    with pytest.raises(SnapshotError, match=message):
        loaded(full_payload(learner, 1, marks=marks if model is None else marks | {"model": model}))


def test_a_payload_without_rows_is_refused(learner: Learner) -> None:
    payload = write_payload(marks_of(learner, 1), learner.dense_serving_state(), {}, 0, lambda: ()).joined()

    with pytest.raises(SnapshotError, match="3 of the 3 default and shared rows of its vocabularies are missing"):
        loaded(payload)


def changed(name: str, state: Tensors) -> Tensors:
    """A serving state with something wrong in it."""
    keys, wide = state["table.keys"], state["table.wide"]
    return {
        "a row that is no number": {"table.wide": wide * torch.nan},
        "a key twice": {"table.keys": torch.where(torch.arange(len(keys)) == 1, keys[0], keys)},
        "no default row": {"table.keys": keys + 1},
        "too many shared rows": {"dense.shared_rows_V": torch.full((3,), 2**40)},
        "shared rows of a negative number": {"dense.shared_rows_V": torch.tensor([0, -1, 0])},
        "shared rows of other vocabularies": {"dense.shared_rows_V": torch.zeros(7, dtype=torch.int64)},
    }[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a row that is no number", r"tensor table\.wide: .* values are NaN or infinite"),
        ("a key twice", "occurs twice"),
        ("no default row", "3 of the 3 default and shared rows of its vocabularies are missing"),
        ("too many shared rows", "dense.shared_rows_V: .*, expected 0 or more each, and at most"),
        ("shared rows of a negative number", "dense.shared_rows_V: .*, expected 0 or more each"),
        ("shared rows of other vocabularies", r"dense\.shared_rows_V: torch\.int64 \[7\], expected torch\.int64 \[3\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(learner: Learner, name: str, message: str) -> None:
    with pytest.raises(SnapshotError, match=message):
        loaded(full_payload(learner, 1, changed=changed(name, learner.serving_state())))


def rows_of(count: int, first: int = 10_000, width: int = 4) -> dict[str, Any]:
    keys = np.arange(first, first + count)
    columns = {"embedding": np.ones((count, width), np.float32), "wide": np.ones((count, 2), np.float32)}
    return {"keys": keys, "columns": columns, "removed": np.zeros(0, np.int64)}


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        (rows_of(3) | {"removed": np.array([10_001])}, "keys of a delta: 10001 occurs twice"),
        (rows_of(3) | {"keys": np.array([1, 2, 1])}, "keys of a delta: 1 occurs twice"),
        (rows_of(3, width=5), "table columns {'embedding': 5, 'wide': 2}, expected {'embedding': 4, 'wide': 2}"),
        (rows_of(0) | {"removed": IdKeys(SCHEMA).required}, "3 of the 3 default and shared rows .* are missing"),
    ],
    ids=["changed and removed", "twice", "other columns", "default rows removed"],
)
def test_a_delta_that_does_not_fit_is_refused(learner: Learner, delta: dict[str, Any], message: str) -> None:
    before = loaded(full_payload(learner, 1))

    with pytest.raises(SnapshotError, match=message):
        loaded(delta_payload(learner, 2, RowDelta(**delta)), before)


def test_a_delta_without_what_it_follows_is_refused(learner: Learner) -> None:
    with pytest.raises(SnapshotError, match="a delta of version 2, expected a full one first"):
        loaded(delta_payload(learner, 2, RowDelta(**rows_of(3))))


def test_a_delta_of_no_rows_is_a_version_of_other_dense_weights(learner: Learner) -> None:
    before = loaded(full_payload(learner, 1))
    dense = {n: t + 0.1 for n, t in learner.dense_serving_state().items() if "heads" in n and t.is_floating_point()}
    assert dense

    after = loaded(delta_payload(learner, 2, RowDelta(**rows_of(0)), changed=dense), before)

    ids, numerics = np.arange(20).reshape(5, 4), np.zeros((5, 0), np.float32)
    assert (after.score(ids, numerics) != before.score(ids, numerics)).all()


def test_a_model_configuration_that_changes_the_tables_columns_is_refused(learner: Learner) -> None:
    before = loaded(full_payload(learner, 1))
    model = json.loads(marks_of(learner, 2)["model"]) | {"wide": False}
    marks = marks_of(learner, 2) | {"model": json.dumps(model)}
    payload = write_payload(
        marks, learner.dense_serving_state(), {}, 0, lambda: (), removed=np.zeros(0, np.int64)
    ).joined()

    with pytest.raises(SnapshotError, match=r"other table columns than \{'embedding': 4, 'wide': 2\} before"):
        loaded(payload, before)
