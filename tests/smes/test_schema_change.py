"""What a change of the schema carries over, in words, in columns and in what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smes.events import DROPPED, ExampleBlock, FeedbackBlock, ImpressionBlock
from smes.schema import MISSING, Derived, Feature, History, Schema, Task
from smes.schema_change import NEW, Renames, SchemaChange

SEEN = Feature("seen", "sequence", query="item_id", vocabulary="item_id", max_length=3)
DID = Feature("did", "sequence", accompanies="seen", max_length=3)
WAS = Schema(
    "shop",
    tasks=(Task("click"), Task("watch", "regression"), Task("like")),
    features=(Feature("tab"), Feature("price", "numeric"), Feature("tags", "bag", max_length=2), SEEN, DID),
    history=History("seen", "did"),
)
FEATURES = [
    Feature("a"),
    Feature("b", "bag", max_length=2),
    Feature("c", "numeric"),
    Feature("d", "numeric"),
    Feature("e", "bag", max_length=3),
    Feature("f"),
]
TASKS = [Task("click"), Task("like"), Task("watch", "regression"), Task("buy")]


@st.composite
def schemas(draw: st.DrawFn) -> Schema:
    """Some of the features and tasks in any order, bags of any width."""
    features = draw(st.lists(st.sampled_from(FEATURES), unique=True))
    widths = [replace(f, max_length=draw(st.integers(1, 4))) if f.kind == "bag" else f for f in features]
    return Schema("s", tuple(draw(st.lists(st.sampled_from(TASKS), unique=True, min_size=1))), tuple(widths))


def random_impressions(schema: Schema, n: int, seed: int) -> ImpressionBlock:
    rng = np.random.default_rng(seed)
    block = ImpressionBlock.empty(schema, n)
    block.ids[:] = np.where(rng.random(block.ids.shape) < 0.3, MISSING, rng.integers(0, 99, block.ids.shape))
    block.numerics[:] = rng.normal(size=block.numerics.shape)
    block.served_scores[:] = rng.random(block.served_scores.shape)
    block.impression_id[:] = np.arange(n)
    return block


@settings(max_examples=60, deadline=None)
@given(was=schemas(), now=schemas(), seed=st.integers(0, 1000))
def test_columns_go_by_name(was: Schema, now: Schema, seed: int) -> None:
    """Every value of what both have is where it belongs; all else is missing, and counted where it had a value."""
    change, block = SchemaChange(was, now), random_impressions(was, 5, seed)

    after = change.impressions(block)

    for feature in now.id_features:
        found = after.ids[:, now.id_slices[feature.name]]
        old = block.ids[:, was.id_slices.get(feature.name, slice(0, 0))][:, : feature.width]
        np.testing.assert_array_equal(found[:, : old.shape[1]], old)
        assert (found[:, old.shape[1] :] == MISSING).all()
    had = {f.name: block.numerics[:, i] for i, f in enumerate(was.numeric_features)}
    for i, feature in enumerate(now.numeric_features):
        np.testing.assert_array_equal(after.numerics[:, i], had.get(feature.name, np.full(5, np.nan)))
    for t, task in enumerate(now.tasks):
        known = task.name in was.task_index
        scores = block.served_scores[:, was.task_index[task.name]] if known else np.full(5, np.nan)
        np.testing.assert_array_equal(after.served_scores[:, t], scores)
        assert (after.no_label >> np.uint64(t) & np.uint64(1) == (not known)).all()
    names = {f.name for f in now.features}
    gone = [f for f in was.features if f.name not in names]
    ids = [(block.ids[:, was.id_slices[f.name]] != MISSING).any(axis=1) for f in gone if f.kind != "numeric"]
    others = len(gone) - len(ids) + len(set(was.task_index) - set(now.task_index))
    np.testing.assert_array_equal(change.count_dropped_values(block), np.sum([np.zeros(5), *ids], axis=0) + others)


@settings(max_examples=40, deadline=None)
@given(was=schemas(), now=schemas(), bits=st.integers(0, 15))
def test_task_numbers_and_sets_of_tasks_say_the_same(was: Schema, now: Schema, bits: int) -> None:
    change = SchemaChange(was, now)
    number, some = np.arange(was.num_tasks), np.array([bits % 2**was.num_tasks], np.uint64)

    numbers = change.task_numbers(number)

    assert [now.tasks[n].name if n != NEW else None for n in numbers] == [
        t.name if t.name in now.task_index else None for t in was.tasks
    ]
    told = {t.name for i, t in enumerate(was.tasks) if bits >> i & 1} & set(now.task_index)
    assert {t.name for i, t in enumerate(now.tasks) if int(change.task_bits(some)[0]) >> i & 1} == told
    outcomes = FeedbackBlock.empty(was.num_tasks)
    outcomes.task[:] = number
    assert change.feedback(outcomes).task.tolist() == [DROPPED if n == NEW else n for n in numbers]


def test_examples_have_no_labels_of_new_tasks() -> None:
    now = replace(WAS, tasks=(Task("buy"), *WAS.tasks[::-1]))
    block = ExampleBlock.empty(WAS, 3)
    block.labels[:] = [[1, 2, 3]] * 3

    after = SchemaChange(WAS, now).examples(block)

    assert after.labels.tolist() == [[0, 3, 2, 1]] * 3
    assert after.label_mask.tolist() == [[False, True, True, True]] * 3
    assert (after.feedback_arrival_ms == MISSING).all()


def test_a_history_means_what_it_meant_though_tasks_come_and_go_before_its_own() -> None:
    now = replace(WAS, tasks=(Task("buy"), Task("like"), Task("watch", "regression")))
    block = random_impressions(WAS, 1, 0)
    block.ids[0, WAS.id_slices["did"]] = [0b11, 0b01, MISSING]  # click and like; click

    after = SchemaChange(WAS, now).impressions(block)

    assert after.ids[0, now.id_slices["did"]].tolist() == [0b10, 0, MISSING]  # like is the second now


RENAMED = Renames(features={"cost": "price", "section": "tab"}, tasks={"bought": "click"})


def test_what_changes_is_told_by_name() -> None:
    now = Schema(
        "shop",
        tasks=(Task("bought", window_s=60), WAS.tasks[1], Task("share")),
        features=(
            Feature("section", vocabulary="place"),
            Feature("cost", "numeric", source="item"),
            Feature("tags", "bag", max_length=5, vocabulary="place"),
            Feature("colour"),
        ),
        derived=(Derived("hour", "hour_of_day"),),
    )

    change = SchemaChange(WAS, now, RENAMED)

    assert change.describe() == [
        "new: feature 'colour' (id)",
        "new: derived feature 'hour' (hour_of_day)",
        "new: task 'share' (binary)",
        "renamed: feature 'section' (was 'tab')",
        "renamed: feature 'cost' (was 'price')",
        "renamed: task 'bought' (was 'click')",
        "dropped: feature 'seen' (sequence)",
        "dropped: feature 'did' (sequence)",
        "dropped: task 'like' (binary)",
        "changed: feature 'cost': source item, was context",
        "changed: feature 'tags': max_length 5, was 2",
        "changed: task 'bought': window_s 60, was 600.0",
        "changed: vocabularies 'tab', 'tags' become one, 'place'",
        "changed: history removed",
    ]
    assert change.vocabularies == {"user_id": "user_id", "item_id": "item_id", "tab": "place", "tags": "place"}
    assert SchemaChange(now, now, RENAMED).describe() == []  # renames stay in the file without effect


def changed(**features: Feature) -> Schema:
    return replace(WAS, features=tuple(features.get(f.name, f) for f in WAS.features))


@pytest.mark.parametrize(
    ("now", "renamed", "problem", "of_events"),
    [
        (changed(tab=Feature("tab", "bag")), {}, "feature 'tab': kind bag, was id; give it another name", True),
        (changed(price=Feature("price", "numeric", transform="log1p")), {}, "transform log1p, was none", False),
        (changed(tab=Feature("tab", dim=4)), {}, "feature 'tab': dim 4, was None", False),
        (changed(price=Feature("price", "numeric", source="item", elapsed=True)), {}, "elapsed True", True),
        (replace(WAS, tasks=(Task("click", "regression"), *WAS.tasks[1:])), {}, "task 'click': kind regression", True),
        (changed(tags=replace(WAS.features[4], vocabulary="t")), {"tab": "tag"}, "renamed.features.tab: 'tag'", None),
        (WAS, {"tabs": "tab"}, "the new schema has no 'tabs'", True),
        (replace(WAS, features=(*WAS.features, Feature("t"))), {"t": "tb"}, "expected one of the old schema's", True),
        (replace(WAS, features=(*WAS.features, Feature("t"))), {"t": "tab"}, "'tab', too: it cannot be both", True),
        (
            changed(price=Feature("p", "numeric"), tab=Feature("q")),
            {"p": "tab", "q": "tab"},
            "of q, p, expected one",
            True,
        ),
        (WAS, {"user_id": "tab"}, "user_id: always has this name", True),
        (
            replace(WAS, features=(*WAS.features, Feature("more", "sequence", accompanies="seen", max_length=3))),
            {},
            "new feature 'more' accompanies 'seen', whose entries would change",
            False,
        ),
    ],
)
def test_what_cannot_be_carried_over_is_named(
    now: Schema, renamed: dict[str, str], problem: str, of_events: bool | None
) -> None:
    change = SchemaChange(WAS, now, Renames(features=renamed))

    if of_events is None:  # the name is there already: without effect
        assert change.problems == ()
        return
    assert any(problem in each for each in change.problems), change.problems
    assert bool(change.problems_of_events) == of_events


def test_a_split_vocabulary_and_another_derivation_are_named() -> None:
    shared = Schema(
        "s", WAS.tasks, (Feature("a", vocabulary="v"), Feature("b", vocabulary="v"), Feature("x", "numeric"))
    )
    was = replace(
        shared, derived=(Derived("size", "bucket", of=("x",), boundaries=(1.0,)), Derived("hour", "hour_of_day"))
    )
    now = Schema(
        "s",
        WAS.tasks,
        (Feature("a", vocabulary="v"), Feature("b"), Feature("x", "numeric"), Feature("hour")),
        derived=(Derived("size", "bucket", of=("x",), boundaries=(1.0, 2.0)),),
    )

    problems = SchemaChange(was, now).problems

    assert [each.partition(";")[0] for each in problems] == [
        "derived feature 'size': boundaries (1.0, 2.0), was (1.0,)",
        "feature 'hour': not derived any more",
        "vocabulary 'v' is split into 'v', 'b': a row cannot be in several",
    ]
    assert SchemaChange(was, now).problems_of_events == ()


def test_names_of_several_changes_ago_are_followed() -> None:
    first, last = (
        Schema("s", WAS.tasks, (Feature("a"), Feature("x"))),
        Schema("s", WAS.tasks, (Feature("c"), Feature("z"))),
    )
    renamed = Renames(features={"c": "b"}).over([Renames(features={"b": "a", "z": "x"})], first)

    assert renamed.between(first, last) == Renames(features={"c": "a", "z": "x"})
    assert SchemaChange(first, last, renamed.between(first, last)).new == ()
