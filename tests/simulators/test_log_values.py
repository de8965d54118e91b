"""Labels, numbers and bags: what is not there is missing, what cannot be read is counted, and nothing is guessed."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simulators.logs.ledger import ColumnCounts
from smes.errors import LogError
from smes.hashing import encode_id
from smes.schema import MISSING
from tests.simulators.made_logs import csv_log, ledger, opened, parquet_log, read

M = MISSING
NAN = float("nan")


@pytest.mark.parametrize("absent", ["nan", "null"])
@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_nan_is_no_value_whatever_statistics_promise(tmp_path: Path, absent: str, statistics: bool, kind: str) -> None:
    """The case of the log whose ratings are there for three impressions in ten."""
    rng, n = np.random.default_rng(0), 2000
    rating = np.where(rng.random(n) < 0.3, rng.integers(1, 6, n).astype(float), NAN)
    click = np.where(rng.random(n) < 0.1, NAN, rng.integers(0, 2, n).astype(float))

    def column(values: Any) -> Any:
        return pa.array(values, getattr(pa, kind)(), from_pandas=absent == "null")

    bag = [[x, 7.0] for x in rating]
    columns = {"rating": column(rating), "click": column(click), "bag": pa.array(bag, pa.list_(pa.float64()))}
    path = parquet_log(tmp_path / "log.parquet", columns, write_statistics=statistics)
    schema = {
        "tasks": "tasks: [{name: liked}, {name: click}, {name: stars, kind: regression, max_value: 5}]",
        "labels": "liked: {column: rating, threshold: 4}, click: click, stars: rating",
        "features": "{name: p, kind: numeric}, {name: f}, {name: bag, kind: bag, max_length: 2}, {name: e}, {name: h}",
        "log": 'features: {p: rating, f: rating, e: {expr: "isnan(rating)"}, h: {expr: "rating >= 4"}}',
    }

    block, found = read(path, **schema), ledger(path, **schema)

    outcomes, there = block.outcomes, ~np.isnan(rating)
    assert np.nansum(outcomes[:, 0]) == (rating >= 4).sum() == 237
    np.testing.assert_array_equal(np.isnan(outcomes[:, 0]), ~there)
    np.testing.assert_array_equal(outcomes[:, 1], click.astype(np.float32))
    np.testing.assert_array_equal(outcomes[:, 2], rating.astype(np.float32))
    np.testing.assert_array_equal(block.impressions.numerics[:, 0], rating.astype(np.float32))
    ids = block.impressions.ids
    np.testing.assert_array_equal(ids[:, 2], np.where(there, rating, 0).astype(np.int64) + np.where(there, 0, M))
    np.testing.assert_array_equal(ids[:, 3], np.where(there, rating, 7).astype(np.int64))
    if absent == "nan":
        np.testing.assert_array_equal(ids[:, 5], ~there)  # the operator's own expressions see NaN too
    assert (found.rejected, found.usable) == (0, n)
    empty = {(c.kind, c.name): c.no_value for c in found.columns}
    assert empty["label", "liked"] == empty["label", "stars"] == empty["feature", "p"] == empty["feature", "f"] == 1396
    assert empty["label", "click"] == np.isnan(click).sum()


@pytest.mark.parametrize("statistics", [True, False])
def test_an_id_or_a_key_of_nan_is_none(tmp_path: Path, statistics: bool) -> None:
    path = parquet_log(tmp_path / "log.parquet", {"user": [1.0, NAN, 3.0]}, write_statistics=statistics)
    keys = pa.table({"id": [1.0, NAN], "price": [5.0, 6.0]})
    pq.write_table(keys, tmp_path / "items.parquet", write_statistics=statistics)
    schema = {
        "features": "{name: price, kind: numeric, source: item}",
        "log": "item_features: {files: items.parquet, key: id}",
    }
    found = ledger(path, **schema)
    assert [(r.reason, r.rows, r.line) for r in found.rejections] == [("user_id (user) is empty", 1, 2)]
    assert [(r.reason, r.rows, r.line) for r in found.joins[0].rejections] == [("key (id) is empty", 1, 2)]
    assert read(path, **schema).impressions.numerics.tolist() == [[5.0], [5.0]]


def test_numbers_that_cannot_be_read_are_counted_by_column(tmp_path: Path) -> None:
    """True and False are 1 and 0."""
    values = {
        "bool": ["True", "FALSE", "true", " false "],
        "comma": ["12,50", "1,299.00", "3.5", ""],
        "percent": ["5%", "10%", "NaN", " "],
        "infinite": ["inf", "-Infinity", "1e39", "1e30"],
        "plain": ["7", " 8 ", "-1.5e3", "nan"],
    }
    rows = zip(*([f'"{value}"' for value in column] for column in values.values()), strict=True)
    path = csv_log(
        tmp_path / "log.csv",
        [f"1,1,{i},0,{','.join(row)}" for i, row in enumerate(rows)],
        f"user,item,ts,click,{','.join(values)}",
    )
    features = ", ".join(f"{{name: {name}, kind: numeric}}" for name in values)

    numerics = read(path, features=features).impressions.numerics
    found = {c.name: c for c in ledger(path, features=features).columns}

    expected = [[1, NAN, NAN, NAN, 7], [0, NAN, NAN, NAN, 8], [1, 3.5, NAN, NAN, -1500], [0, NAN, NAN, 1e30, NAN]]
    np.testing.assert_array_equal(numerics, np.array(expected, np.float32))
    assert found["bool"] == ColumnCounts("feature", "bool", "bool", "log", 4, 0, 0)
    assert found["comma"] == ColumnCounts("feature", "comma", "comma", "log", 4, 1, 2, "12,50", "log.csv", 2)
    assert found["percent"] == ColumnCounts("feature", "percent", "percent", "log", 4, 2, 2, "5%", "log.csv", 2)
    assert found["infinite"] == ColumnCounts("feature", "infinite", "infinite", "log", 4, 0, 3, "inf", "log.csv", 2)
    assert (found["plain"].no_value, found["plain"].unreadable) == (1, 0)


@pytest.mark.parametrize("table", ["log", "item"])
def test_a_column_with_nothing_readable_is_refused(tmp_path: Path, table: str) -> None:
    csv_log(tmp_path / "log.csv", ["1,1,1,0,5%", "1,2,2,1,10%"], "user,item,ts,click,discount")
    (tmp_path / "items.csv").write_text("id,discount\n1,5%\n2,7%\n")
    side = "item_features: {files: items.csv, key: id}" if table == "item" else ""
    source = ", source: item" if table == "item" else ""
    features = f"{{name: discount, kind: numeric{source}}}"
    file = "items.csv" if table == "item" else "log.csv"
    with (
        pytest.raises(LogError, match=rf"feature discount \(discount\): '5%' in {file}:2, and no readable value"),
        opened(tmp_path / "log.csv", max_rejected=0.01, features=features, log=side) as reader,
    ):
        next(reader.blocks())


def test_what_is_no_number_is_refused_by_type(tmp_path: Path) -> None:
    path = parquet_log(tmp_path / "log.parquet", {"p": pa.array([1], pa.timestamp("us")), "click": [[1]]})
    with pytest.raises(LogError, match=r"column 'p' is TIMESTAMP, expected numbers or text \(log\.features\.p\)"):
        read(path, features="{name: p, kind: numeric}")
    with pytest.raises(
        LogError, match=r"column 'click' is BIGINT\[\], expected numbers or text \(log\.labels\.click\)"
    ):
        read(path)


BAGS: list[tuple[str, list[int | str | float] | None]] = [  # as text, and the ids that it holds
    ("[27, 9]", [27, 9]),
    ("[9,27]", [9, 27]),
    (' ["rock", "pop"] ', ["rock", "pop"]),
    ("['rock', 'pop']", ["rock", "pop"]),
    ("""['rock', "it's", 5]""", ["rock", "it's", 5]),
    (r'["caf\u00e9", "a, b", " x"]', ["café", "a, b", " x"]),
    ("[1e2, 27.0, null]", ["1e2", 27]),
    ("[None, 'a']", ["a"]),
    ("[8]", [8]),
    ("[]", []),
    ("rock, pop", ["rock", "pop"]),
    ("pop | rock|", ["pop", "rock"]),
    ("29.0,,0100", [29, "0100"]),
    ("pop", ["pop"]),
    ("[100,1k)", ["[100", "1k)"]),
    ("[27 9]", None),
    ("[[1], [2]]", None),
    ('[{"a": 1}]', None),
    ("[a, b]", None),
    ("[NaN]", None),
    ("['rock' 'pop']", None),
    ("['it''s']", None),
    ("['a', 1e2, None, True]", ["a", "1e2", "True"]),
]


def test_bags_as_text(tmp_path: Path) -> None:
    """Lists of JSON and of Python; else commas and bars. What is in brackets and no list is counted."""
    folder = tmp_path
    quoted = ['"' + text.replace('"', '""') + '"' for text, _ in BAGS]
    csv_log(folder / "log.csv", [f"1,1,{i},0,{text}" for i, text in enumerate(quoted)], "user,item,ts,click,bag")
    parquet_log(folder / "log.parquet", {"bag": [text for text, _ in BAGS]})
    padded = [[*map(encode_id, ids or ()), M, M, M][:3] for _, ids in BAGS]
    for path in (folder / "log.csv", folder / "log.parquet"):
        features = "{name: bag, kind: bag, max_length: 3}"
        assert read(path, features=features).impressions.ids[:, 2:].tolist() == padded
        (column,) = [c for c in ledger(path, features=features).columns if c.name == "bag"]
        line = 17 if path.suffix == ".csv" else 16
        assert (column.no_value, column.unreadable, column.example, column.line) == (1, 7, "[27 9]", line)


def test_a_declared_separator_is_the_only_one(tmp_path: Path) -> None:
    path = csv_log(tmp_path / "log.csv", ['1,1,1,0,"a, b; c|d ;;"', '1,1,2,0,"[1,2]"'], "user,item,ts,click,bag")
    ids = read(
        path,
        features="{name: bag, kind: bag, max_length: 3}",
        log='features: {bag: {column: bag, separator: ";"}}',
    ).impressions.ids[:, 2:]
    assert ids.tolist() == [[encode_id("a, b"), encode_id("c|d"), M], [1, 2, M]]


def test_a_part_without_a_column_is_refused_unless_it_is_optional(tmp_path: Path) -> None:
    """A file without the label would be one of negatives only."""
    (folder := tmp_path / "log").mkdir()
    csv_log(folder / "1.csv", ["1,1,1,1,5"], "user,item,ts,click,f")
    csv_log(folder / "2.csv", ["2,1,2,5"], "user,item,ts,f")
    csv_log(folder / "3.csv", ["3,1,3,0"], "user,item,ts,click")
    features, optional = "{name: f}", "click: {column: click, optional: true}"

    with pytest.raises(
        LogError, match=r"2\.csv: no column 'click', expected by log\.labels\.click; the columns are user"
    ):
        read(folder, log="files: '[12].csv'")
    with pytest.raises(LogError, match=r"3\.csv: no column 'f', expected by log\.features\.f; .*features\.f\.optional"):
        read(folder, features=features, log="files: '[13].csv'")
    with pytest.raises(LogError, match=r"2\.csv: no column 'click'.*log\.labels\.click\.optional: true reads such"):
        read(folder)
    block = read(folder, features=features, labels=optional, log="features: {f: {optional: true}}")
    assert block.impressions.ids[:, 2].tolist() == [5, 5, M]
    np.testing.assert_array_equal(block.outcomes[:, 0], np.array([1, NAN, 0], np.float32))
    found = ledger(folder, features=features, labels=optional, log="features: {f: {optional: true}}")
    assert {(c.name, c.no_value) for c in found.columns} == {("click", 1), ("f", 1)}


@pytest.mark.parametrize("key", ["user_id", "item_id", "event_time"])
def test_a_part_without_an_id_or_a_time_is_refused(tmp_path: Path, key: str) -> None:
    (folder := tmp_path / "log").mkdir()
    column = {"user_id": "user", "item_id": "item", "event_time": "ts"}[key]
    csv_log(folder / "1.csv", ["1,1,1,1"])
    csv_log(folder / "2.csv", ["1,1,1,1"], "user,item,ts,click".replace(column, "other"))
    with pytest.raises(
        LogError, match=rf"2\.csv: no column '{column}', expected by log\.{key}; the columns are .*other"
    ):
        read(folder)


def test_an_outcome_whose_time_is_none_is_rejected(tmp_path: Path) -> None:
    path = csv_log(tmp_path / "log.csv", ["1,1,1,1,2", "1,1,2,1,soon", "1,1,3,0,"], "user,item,ts,click,at")
    labels = "click: {column: click, time_column: at}"
    (rejection,) = ledger(path, labels=labels).rejections
    assert (rejection.reason, rejection.line, rejection.value) == (
        "log.labels.click.time_column (at) is no time in s",
        3,
        "soon",
    )
    times = read(path, labels=labels).outcome_time_ms
    assert times is not None
    assert times[:, 0].tolist() == [2000, M]


def test_keys_of_a_feature_table_that_match_nothing_are_counted(tmp_path: Path) -> None:
    csv_log(tmp_path / "log.csv", ["1,1,1,0", "2,2,2,1", "3,3,3,1", "3,3,4,1"])
    (tmp_path / "items.csv").write_text("id,price\nitem_1,5\nitem_2,6\nitem_2,7\n")
    side = "item_features: {files: items.csv, key: id}"
    (join,) = ledger(tmp_path / "log.csv", features="{name: price, kind: numeric, source: item}", log=side).joins
    assert (join.entity, join.rows, join.repeated, join.rejections) == ("item", 3, 1, ())
    assert (join.ids_in_log, join.ids_matched, join.impressions, join.impressions_missed) == (3, 0, 4, 4)


def test_bags_of_a_feature_table_that_lacks_items(tmp_path: Path) -> None:
    csv_log(tmp_path / "log.csv", [f"1,{row % 7},{row},0" for row in range(700)])
    rows = [f"{item},{item}|{item + 1}" for item in range(5)]
    (tmp_path / "items.csv").write_text("\n".join(["id,tags", *rows, ""]))
    side = "item_features: {files: items.csv, key: id}"

    block = read(tmp_path / "log.csv", features="{name: tags, kind: bag, max_length: 3, source: item}", log=side)

    found = {item: set(map(tuple, block.impressions.ids[item::7, 2:].tolist())) for item in range(7)}
    assert found == {item: {(item, item + 1, M) if item < 5 else (M, M, M)} for item in range(7)}


def test_more_watched_columns_than_an_integer_has_bits(tmp_path: Path) -> None:
    names = [f"n{i}" for i in range(70)]
    path = csv_log(
        tmp_path / "log.csv",
        [f"1,1,{row},0,{','.join('?' if i % 7 == row else '' for i in range(70))}" for row in range(7)],
        f"user,item,ts,click,{','.join(names)}",
    )
    found = ledger(path, features=", ".join(f"{{name: {name}, kind: numeric}}" for name in names))
    assert [(c.no_value, c.unreadable, c.line) for c in found.columns if c.kind == "feature"] == [
        (6, 1, i % 7 + 2) for i in range(70)
    ]
