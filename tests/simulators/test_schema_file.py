"""Schema files: what is accepted, and that every mistake is one line with key, value and what was expected."""

from pathlib import Path

import pytest

from smes.schema import History, Schema
from smes_io.log_spec import LabelSource
from smes_io.schema_file import SchemaFile, feature_columns, load_builtin, load_schema_file

GOOD = """
name: tiny
tasks: [{name: click, window_s: 5}, {name: stars, kind: regression}]
features: [{name: place}]
log:
  user_id: u
  item_id: i
  event_time: t
  features: {place: {column: p}}
  labels: {click: c, stars: s}
"""


def load(tmp_path: Path, text: str) -> SchemaFile:
    path = tmp_path / "tiny.yaml"
    path.write_text(text)
    return load_schema_file(path)


def test_a_bare_string_stands_for_a_column(tmp_path: Path) -> None:
    loaded = load(tmp_path, GOOD)
    assert loaded.log is not None
    assert loaded.log.labels["click"] == LabelSource("c")
    assert isinstance(loaded.schema, Schema)
    assert [f.name for f in loaded.schema.features] == ["user_id", "item_id", "place"]


def test_the_log_section_is_optional(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD.split("log:")[0]).log is None


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("name: click, window_s: 5", "name: click, window: 5", ["tasks.0.window", "5", "unknown key", "window_s"]),
        ("window_s: 5", "window_s: -5", ["tasks.0", "-5", "more than 0"]),
        ("window_s: 5", "window_s: soon", ["tasks.0.window_s: 'soon', expected a number"]),
        ("kind: regression", "kind: ordinal", ["tasks.1.kind: 'ordinal', expected one of binary, regression"]),
        ("  user_id: u\n", "", ["log.user_id", "missing"]),
        ("user_id: u", "user: u\n  user_id: u", ["log.user", "'u'", "unknown key", "item_id"]),
        ("{column: p}", "{column: p, expr: 1 + 1}", ["log.features.place.expr: '1 + 1' beside column 'p'"]),
        ("{column: p}", "{col: p}", ["log.features.place.col", "'p'", "unknown key", "separator"]),
        ("place: {", "palce: {", ["log.features.palce", "one of place"]),
        ("click: c,", "", ["'click' has no label"]),
        ("click: c,", "click: c, like: l,", ["log.labels.like", "click, stars"]),
        ("click: c,", "click: {column: c, delay: {sigma: -1}},", ["log.labels.click.delay.sigma: -1, expected at"]),
        ("click: c,", "click: {column: c, delay: {at_least: click}},", ["at_least", "'click'", "regression task"]),
        ("stars: s", "stars: {column: s, threshold: 3}", ["log.labels.stars.threshold", "3", "regression"]),
        ("[{name: place}]", "[{name: place}, {name: place}]", ["duplicate feature 'place'"]),
        ("name: tiny", "- name: tiny", ["expected"]),
        (GOOD, "just text", ["expected a mapping", "str"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(tmp_path: Path, old: str, new: str, parts: list[str]) -> None:
    assert old in GOOD
    with pytest.raises(ValueError) as error:
        load(tmp_path, GOOD.replace(old, new))
    message = str(error.value)
    assert "\n" not in message
    for part in [str(tmp_path / "tiny.yaml"), *parts]:
        assert part in message


TOLD = GOOD.replace(
    "features: [{name: place}]",
    """features:
  - {name: place}
  - {name: seen, kind: sequence, max_length: 3, vocabulary: item_id, query: item_id}
  - {name: outcomes, kind: sequence, max_length: 3, accompanies: seen}
history: {items: seen, outcomes: outcomes, tasks: [click], window_s: 60}""",
)


def test_a_history_is_part_of_the_schema_and_read_from_no_column(tmp_path: Path) -> None:
    loaded = load(tmp_path, TOLD)
    assert loaded.schema.history == History("seen", "outcomes", ("click",), 60)
    assert loaded.log is not None
    assert set(feature_columns(loaded.schema, loaded.log)) == {"place"}


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("window_s: 60}", "window: 60}", ["history.window", "unknown key", "window_s"]),
        ("window_s: 60}", "window_s: 0}", ["history.window_s: 0", "at least 0.001"]),
        ("tasks: [click],", "tasks: [stars],", ["history.tasks", "'stars'", "binary tasks"]),
        ("items: seen", "items: saw", ["history.items", "'saw'", "context sequence with query item_id"]),
        ("{place: {column: p}}", "{place: p, seen: s}", ["log.features.seen", "which the replay builds"]),
        ("kind: sequence, max_length: 3, acc", "kind: sequence, max_length: 4, acc", ["'outcomes'", "same max_length"]),
    ],
)
def test_a_mistake_in_a_history_is_one_line_that_names_it(tmp_path: Path, old: str, new: str, parts: list[str]) -> None:
    assert old in TOLD
    with pytest.raises(ValueError) as error:
        load(tmp_path, TOLD.replace(old, new))
    message = str(error.value)
    assert "\n" not in message
    for part in [str(tmp_path / "tiny.yaml"), *parts]:
        assert part in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.yaml: expected a readable file"):
        load_schema_file(tmp_path / "none.yaml")


def test_kuairand_uses_no_outcome_as_a_feature() -> None:
    loaded = load_builtin("kuairand")
    assert loaded.log is not None
    outcomes = {"long_view", "play_time_ms", "profile_stay_time", "comment_stay_time"}
    for feature in loaded.schema.features:
        source = loaded.log.features.get(feature.name)
        read = feature.name if source is None else (source.column or source.expr or feature.name)
        assert not any(outcome in read for outcome in outcomes), feature.name
        assert not read.startswith("is_") or read in ("is_lowactive_period", "is_video_author"), feature.name
    assert loaded.schema.max_window_ms <= 30 * 60 * 1000
    assert {t.name for t in loaded.schema.tasks} == {
        *("click", "long_view", "watch_time", "like", "profile_enter", "comment", "follow", "forward", "hate")
    }


def test_synthetic_has_eight_tasks_from_dense_to_sparse() -> None:
    assert len(load_builtin("synthetic").tasks) == 8


def test_an_unknown_builtin_is_refused() -> None:
    with pytest.raises(ValueError, match="kuairand, synthetic"):
        load_builtin("nosuch")


def test_one_string_stands_for_a_list_of_one_pattern(shop_schema: SchemaFile) -> None:
    assert shop_schema.log is not None
    assert shop_schema.log.files == ("visits*.csv",)
    assert shop_schema.log.user_features is not None
    assert shop_schema.log.user_features.files == ("customers.csv",)
