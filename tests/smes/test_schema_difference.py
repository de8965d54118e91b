"""What differs between two schemas is named: features, tasks, history, order."""

import json
from dataclasses import replace

import pytest

from smes.errors import SchemaMismatch
from smes.schema import Feature, History, Schema, Task
from smes.schema_difference import describe_difference, describe_difference_from

SEEN = Feature("seen", "sequence", query="item_id", vocabulary="item_id")
LIKED = Feature("liked", "sequence", accompanies="seen")
WAS = Schema(
    "shop",
    tasks=(Task("click"), Task("watch", "regression")),
    features=(Feature("tab"), Feature("price", "numeric"), SEEN, LIKED),
    history=History("seen", "liked"),
)


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (WAS, ""),
        (replace(WAS, name="store"), "name 'store', was 'shop'"),
        (replace(WAS, features=(*WAS.features, Feature("size"))), "new feature 'size'"),
        (replace(WAS, features=WAS.features[:3] + WAS.features[4:]), "no feature 'price' any more"),
        (
            replace(WAS, features=(Feature("tab", dim=8, vocabulary="tabs"), *WAS.features[3:])),
            "feature 'tab': vocabulary tabs, was None, dim 8, was None",
        ),
        (
            replace(WAS, features=(WAS.features[3], WAS.features[2], *WAS.features[4:])),
            "features in another order: user_id, item_id, price, tab, seen, liked",
        ),
        (replace(WAS, tasks=(*WAS.tasks, Task("like"))), "new task 'like'"),
        (replace(WAS, tasks=WAS.tasks[:1]), "no task 'watch' any more"),
        (replace(WAS, tasks=WAS.tasks[::-1]), "tasks in another order: watch, click"),
        (replace(WAS, tasks=(Task("click", window_s=9), WAS.tasks[1])), "task 'click': window_s 9, was 600.0"),
        (replace(WAS, history=None), "history removed"),
        (replace(WAS, history=History("seen", "liked", window_s=5)), "history: window_s 5, was 57600.0"),
    ],
)
def test_each_difference_is_named(now: Schema, words: str) -> None:
    assert describe_difference(WAS, now) == words
    assert describe_difference_from(json.dumps(WAS.to_dict()), now) == words
    assert (words == "") == (WAS.hash == now.hash)


def test_many_differences_are_counted() -> None:
    now = replace(WAS, features=(*WAS.features, *(Feature(f"f{i}") for i in range(20))))

    words = describe_difference(WAS, now)

    assert words.count("new feature") == 8
    assert words.endswith(" and 12 more")


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", "{}", '{"name": 1, "tasks": 2}', "[" * 100_000, '{"tasks": [[]]}']
)
def test_what_is_no_schema_has_no_description(text: str | None) -> None:
    assert describe_difference_from(text, WAS) == ""


def test_the_error_names_what_differs_or_says_that_only_hashes_are_known() -> None:
    known = str(SchemaMismatch("checkpoint c", expected="aa", got="bb", difference="new feature 'size'"))
    unknown = str(SchemaMismatch("features in Redis", expected="aa", got="bb"))

    assert (
        known == "checkpoint c: schema hash bb differs from the configured schema's aa; configured: new feature 'size'"
    )
    assert unknown.endswith("what differs is not known here, for it holds no schema")
