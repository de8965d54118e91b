"""Ids in logs: the reader's SQL is ``encode_id``, file by file, whatever the column's type."""

import csv
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from simulators.logs.reader import open_log
from smes.errors import LogError
from smes.hashing import encode_id
from smes.schema import MISSING
from smes_io.schema_file import load_schema_file
from tests.simulators.made_logs import csv_log, ledger, parquet_log, read, schema_text

DIGITS = st.text("0123456789+-.eE_ abcdefxn", min_size=1, max_size=24)
TEXTS = st.one_of(
    DIGITS,
    st.integers().map(str),
    st.integers(-(2**64), 2**64).map(lambda x: f"{x}.0"),
    st.floats().map(repr),
    st.text("0123456789abcdef", min_size=1, max_size=32),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
    st.sampled_from(["nan", "NaN", "None", "true", "-0", " ", "\t", "1\u0660", "#5", '"', "a,b", "x|y", "'", "\\"]),
)
NULL_WORDS = ("", "NULL", "null", r"\N")


@settings(
    max_examples=20,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    deadline=None,
)
@given(texts=st.lists(TEXTS.filter(lambda text: text not in NULL_WORDS), min_size=200, max_size=300))
def test_the_reader_is_encode_id(tmp_path: Path, texts: list[str]) -> None:
    """In CSV and in Parquet, for users, features and the elements of bags."""
    with (tmp_path / "log.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writerow(["user", "item", "ts", "click", "f"])
        writer.writerows([text, i, i, 0, text] for i, text in enumerate(texts))
    parquet_log(tmp_path / "log.parquet", {"user": texts, "f": texts, "b": [[text] for text in texts]})
    expected = [encode_id(text) for text in texts]

    from_csv = read(tmp_path / "log.csv", features="{name: f}")
    bag = "{name: b, kind: bag, max_length: 1}"
    from_parquet = read(tmp_path / "log.parquet", features=f"{{name: f}}, {bag}")

    for column in (0, 2):
        assert from_csv.impressions.ids[:, column].tolist() == expected
    for column in (0, 2, 3):
        assert from_parquet.impressions.ids[:, column].tolist() == expected


def test_hex_ids_do_not_collide(tmp_path: Path) -> None:
    """65,536 hex ids are 65,536 users; ``1e2`` and its like are seven."""
    whole = csv_log(tmp_path / "log.csv", [f"{i:04x},1,{1_600_000_000 + i},0" for i in range(65_536)])
    assert len(set(read(whole).impressions.user_id.tolist())) == 65_536
    texts = ["1e2", "10e1", "0100", "100", "+100", "1_00", "01e2"]
    small = csv_log(tmp_path / "small.csv", [f"{text},1,{i},0" for i, text in enumerate(texts)])
    assert read(small).impressions.user_id.tolist() == [encode_id(text) for text in texts]


def test_integers_of_one_file_are_not_read_as_the_doubles_of_another(tmp_path: Path) -> None:
    """pandas makes doubles of integers with one missing."""
    (folder := tmp_path / "log").mkdir()
    big = [900719925474099301, 900719925474099302, 900719925474099303]
    parquet_log(folder / "day1.parquet", {"user": big, "ts": [1, 2, 3]})
    parquet_log(folder / "day2.parquet", {"user": pa.array([5.0, None, 7.0]), "ts": [4, 5, 6]})
    csv_log(tmp_path / "same.csv", ["5.0,1,1,0", "5,1,2,0"])

    assert read(folder).impressions.user_id.tolist() == [*big, 5, 7]
    assert read(tmp_path / "same.csv").impressions.user_id.tolist() == [5, 5]


def test_rows_that_differ_in_ids_beyond_doubles_are_no_duplicates(tmp_path: Path) -> None:
    """And rows that do not differ are, though one file keeps integers and the other doubles."""
    (folder := tmp_path / "log").mkdir()
    same = {"item": [1, 1], "ts": [7, 7], "click": [0, 0]}
    parquet_log(folder / "day1.parquet", {"user": [2**60 + 1, 5], **same})
    parquet_log(folder / "day2.parquet", {"user": [2.5, 5.0], **same})
    parquet_log(folder / "day3.parquet", {"user": [2**60, 2**60 + 1], **same})
    found = ledger(folder)
    assert (found.usable, found.duplicates) == (4, 2)


@pytest.mark.parametrize("where", ["user", "item", "f", "b", "request"])
@pytest.mark.parametrize(("kind", "value"), [("float64", 2.0**53), ("float64", -1e300), ("float32", 2.0**24)])
def test_a_float_that_may_have_been_another_integer_is_refused(
    tmp_path: Path, where: str, kind: str, value: float
) -> None:
    values = {name: np.array([1, 2, 3, 4], np.float64) for name in ("user", "item", "f", "b", "request")}
    values[where][2] = value
    columns: dict[str, Any] = {name: pa.array(column, getattr(pa, kind)()) for name, column in values.items()}
    columns["b"] = pa.array([[x] for x in values["b"]], pa.list_(getattr(pa, kind)()))
    path = parquet_log(tmp_path / "log.parquet", columns)
    with pytest.raises(LogError, match=rf"log\.parquet row 3: {where} is .*expected ids as integers or text"):
        read(path, features="{name: f}, {name: b, kind: bag, max_length: 2}", log="request_id: request")


def test_a_key_of_a_feature_table_that_may_have_been_another_is_refused(tmp_path: Path) -> None:
    csv_log(tmp_path / "log.csv", ["1,1,1,0"])
    pq.write_table(pa.table({"id": [1.0, 2.0**53 + 2], "f": [1, 2]}), tmp_path / "items.parquet")
    with pytest.raises(LogError, match=r"items\.parquet row 2: id is 9007199254740994\.0"):
        read(
            tmp_path / "log.csv",
            features="{name: f, source: item}",
            log="item_features: {files: items.parquet, key: id}",
        )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([7, None], pa.uint64()), [7, MISSING]),
        (pa.array([2**64 - 1, 1], pa.uint64()), [encode_id(2**64 - 1), 1]),
        (pa.array([Decimal("5.00"), Decimal("5.50")], pa.decimal128(10, 2)), [5, encode_id("5.5")]),
        (pa.array([Decimal(100), Decimal(7)], pa.decimal128(20, 0)), [100, 7]),
        (pa.array([-(2**63), 2**63 - 1], pa.int64()), [encode_id(-(2**63)), 2**63 - 1]),
        (pa.array([True, False]), [1, 0]),
        (pa.array([1.5, float("nan")]), [encode_id("1.5"), MISSING]),
        (pa.array([1.5, -0.0], pa.float32()), [encode_id("1.5"), 0]),
        (pa.array([0, 86_400], pa.date32()), [encode_id("1970-01-01"), encode_id("2206-07-23")]),
        (pa.array(["é".encode(), b"5"], pa.binary()), [encode_id("é"), 5]),
        (pa.array(["a", "5"]).dictionary_encode(), [encode_id("a"), 5]),
        (pa.array(["a", "5"], pa.large_string()), [encode_id("a"), 5]),
    ],
)
def test_a_value_has_one_id_in_columns_of_every_type(tmp_path: Path, values: Any, expected: list[int]) -> None:
    path = parquet_log(tmp_path / "log.parquet", {"f": values})
    assert read(path, features="{name: f}").impressions.ids[:, 2].tolist() == expected


@pytest.mark.parametrize("kind", ["id", "bag", "numeric"])
@pytest.mark.parametrize(
    ("values", "sql_type"),
    [
        ([{"a": 1}], "STRUCT"),
        ([[[1], [2]]], r"BIGINT\[\]\[\]"),
        ([[{"a": 1}]], "STRUCT"),
        (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), "MAP"),
    ],
)
def test_values_of_parts_are_refused_by_name(tmp_path: Path, kind: str, values: Any, sql_type: str) -> None:
    path = parquet_log(tmp_path / "log.parquet", {"f": values})
    length = ", max_length: 2" if kind == "bag" else ""
    with pytest.raises(LogError, match=rf"log\.parquet: column 'f' is {sql_type}.*, expected .*\(log\.features\.f\)"):
        read(path, features=f"{{name: f, kind: {kind}{length}}}")


def test_a_list_is_no_user(tmp_path: Path) -> None:
    path = parquet_log(tmp_path / "log.parquet", {"user": [[1, 2]]})
    with pytest.raises(LogError, match=r"column 'user' is BIGINT\[\], expected integers or text \(log\.user_id\)"):
        read(path)


def test_null_words_are_the_same_for_ids_labels_features_and_bags(tmp_path: Path) -> None:
    """Others are texts like any other."""
    words = ["", "NULL", "null", r"\N", "None", "nan", "NA"]
    rows = [f"u{i},1,{i},{word if i < 4 else 0},{word},{word},x|{word}" for i, word in enumerate(words)]
    features = "{name: f}, {name: p, kind: numeric}, {name: b, kind: bag, max_length: 2}"
    csv_log(tmp_path / "log.csv", rows, "user,item,ts,click,f,p,b")
    parquet_log(
        tmp_path / "log.parquet",
        {
            "user": [f"u{i}" for i in range(7)],
            "ts": [*range(7)],
            "click": [*words[:4], "0", "0", "0"],
            "f": words,
            "p": words,
            "b": [["x", word] for word in words],
        },
    )
    for path in (tmp_path / "log.csv", tmp_path / "log.parquet"):
        block, found = read(path, features=features), ledger(path, features=features)
        ids = block.impressions.ids
        assert ids[:, 2].tolist() == [MISSING] * 4 + [encode_id(word) for word in words[4:]]
        assert ids[:, 4].tolist() == [MISSING] * 4 + [encode_id(word) for word in words[4:]]
        assert np.isnan(block.outcomes[:, 0]).tolist() == [True] * 4 + [False] * 3
        (price,) = [column for column in found.columns if column.name == "p"]
        assert (price.no_value, price.unreadable, price.example) == (5, 2, "None")  # nan is a number that is not there

    declared = schema_text(features=features, log='null_words: ["", "None", "NA"]')
    (tmp_path / "declared.yaml").write_text(declared)
    (tmp_path / "log.csv").write_text("user,item,ts,click,f,p,b\nu0,1,1,NA,None,NA,x|NA\nNone,1,2,0,NULL,1,NULL\n")
    with open_log(tmp_path / "log.csv", load_schema_file(tmp_path / "declared.yaml"), max_rejected=1) as reader:
        (block,) = reader.blocks()
        assert block.impressions.ids[:, 2:].tolist() == [[MISSING, encode_id("x"), MISSING]]
        assert reader.rejected == {"user_id (user) is empty": 1}
