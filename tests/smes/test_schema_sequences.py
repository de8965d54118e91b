"""Sequences, a history and elapsed times: what a schema accepts, and what its columns mean."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from smes.events import fill_elapsed, misaligned
from smes.schema import MISSING, Feature, History, Schema, Task

ITEMS = Feature("seen", kind="sequence", max_length=3, vocabulary="item_id", query="item_id")
OUTCOMES = Feature("outcomes", kind="sequence", max_length=3, accompanies="seen")
HISTORY = History("seen", "outcomes")
TASKS = (Task("click"), Task("watch", kind="regression"), Task("like"))


def schema(*features: Feature, history: History | None = HISTORY) -> Schema:
    return Schema("shop", TASKS, features or (ITEMS, OUTCOMES), history)


def test_a_schema_with_a_history_survives_its_plain_form() -> None:
    with_history = schema(history=replace(HISTORY, tasks=("like",)))

    assert Schema.from_dict(with_history.to_dict()) == with_history


def test_the_history_is_part_of_the_hash() -> None:
    hashes = {schema(history=replace(HISTORY, tasks=("like",))).hash, schema().hash, schema(history=None).hash}

    assert len(hashes) == 3


def test_outcomes_cover_the_named_tasks_or_every_binary_one() -> None:
    assert schema(history=replace(HISTORY, tasks=("like",))).history_tasks == (2,)
    assert schema().history_tasks == (0, 2)
    assert schema(history=None).history_tasks == ()


def test_a_sequence_has_companions_and_columns() -> None:
    assert schema().companions == {"seen": (OUTCOMES,)}
    assert schema().id_slices["outcomes"] == slice(5, 8)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"query": None}, "either query or accompanies"),
        ({"accompanies": "seen"}, "either query or accompanies"),
        ({"kind": "bag"}, "neither for another kind"),
        ({"max_length": 0}, "feature 'seen'.max_length: 0, expected at least 1, at most 1024"),
        ({"query": "nothing"}, "'seen': query 'nothing'"),
        ({"vocabulary": None}, "'seen': query 'item_id', expected an id feature of the same vocabulary and dim"),
        ({"dim": 4}, "same vocabulary and dim"),
        ({"max_length": 4}, "'outcomes': accompanies 'seen', expected .* same max_length"),
        ({"source": "user"}, "'outcomes': accompanies 'seen'"),
    ],
)
def test_a_sequence_that_does_not_fit_is_refused(changed: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        schema(replace(ITEMS, **changed), OUTCOMES, history=None)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"items": "outcomes"}, "history.items: 'outcomes', expected a context sequence with query item_id"),
        ({"outcomes": "seen"}, "history.outcomes: 'seen', expected a sequence that accompanies seen"),
        ({"tasks": ("watch",)}, "history.tasks: 'watch', expected binary tasks, of click, like"),
        ({"tasks": ("like", "like")}, "duplicate task 'like'"),
        ({"window_s": 0.0}, r"history\.window_s: 0\.0, expected at least 0\.001"),
        ({"window_s": float("nan")}, r"history\.window_s: nan"),
    ],
)
def test_a_history_that_does_not_fit_is_refused(changed: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        schema(history=replace(HISTORY, **changed))


@pytest.mark.parametrize("wrong", [{"kind": "numeric"}, {"source": "item"}])
def test_elapsed_is_for_stored_numbers_only(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="'born': elapsed, expected only of numeric user and item features"):
        Feature("born", elapsed=True, **wrong)


def test_rows_with_sequences_of_different_lengths_are_found() -> None:
    def row(seen: list[int], outcomes: list[int]) -> list[int]:
        return [1, 2, *(seen + [MISSING] * 3)[:3], *(outcomes + [MISSING] * 3)[:3]]

    ids = np.array([row([7, 8], [0, 1]), row([7], [0, 1]), row([], []), row([7], []), row([1, 2, 3], [0, 0, 0])])

    assert misaligned(ids, schema()).tolist() == [False, True, False, True, False]


def test_stored_times_become_days() -> None:
    born = Feature("born", kind="numeric", source="item", elapsed=True)
    numerics = np.array([[5.0, 86_400.0], [6.0, np.nan]], np.float32)

    fill_elapsed(numerics, schema(Feature("price", kind="numeric"), born, history=None), np.array([86_400_000 * 3, 1]))

    np.testing.assert_array_equal(numerics, np.array([[5, 2], [6, np.nan]], np.float32))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Feature(""), "feature name: expected a non-empty string"),
        (lambda: Feature("city", dim=0), "feature 'city'.dim: 0, expected at least 1"),
        (lambda: Task(""), "task name: expected a non-empty string"),
        (lambda: Task("buy", window_s=0), "task 'buy'.window_s: 0, expected more than 0"),
        (lambda: Task("buy", loss_weight=-1), "task 'buy'.loss_weight: -1, expected at least 0"),
        (lambda: Task("buy", max_value=0), "task 'buy'.max_value: 0, expected more than 0"),
    ],
)
def test_values_out_of_range_are_refused_by_name(make: Callable[[], object], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        make()
