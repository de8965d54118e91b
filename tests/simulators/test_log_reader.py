"""The log reader on a handmade log whose right answer is written out by hand."""

from pathlib import Path

import duckdb
import numpy as np
import pytest

from simulators.logs.reader import LogBlock, LogReader, open_log
from smes.errors import LogError
from smes.hashing import stable_id
from smes.schema import MISSING
from smes_io.schema_file import SchemaFile, load_schema_file

M = MISSING


def read(reader: LogReader, rows_per_block: int = 8192) -> list[LogBlock]:
    return list(reader.blocks(rows_per_block))


def test_rows_are_sorted_joined_and_encoded(shop_dir: Path, shop_schema: SchemaFile) -> None:
    with open_log(shop_dir, shop_schema) as reader:
        (block,) = read(reader)
    c1, c2, c3 = (stable_id(name) for name in ("c1", "c2", "c3"))
    gold, silver, acme, red, blue, home, search = (
        stable_id(name) for name in ("gold", "silver", "acme", "red", "blue", "home", "search")
    )
    # By time; the two rows at 900.5 s keep their order in the file. Thursday 1970-01-01 is weekday 3.
    expected = [  # user, item, plan, brand, labels (3), page, weekday
        [c3, 13, M, M, M, M, M, M, 3],
        [c1, 12, gold, acme, M, M, M, search, 3],
        [c1, 11, gold, 5, red, blue, 9, search, 3],
        [c2, 11, silver, 5, red, blue, 9, home, 3],
    ]
    impressions = block.impressions
    np.testing.assert_array_equal(impressions.ids, expected)
    np.testing.assert_array_equal(impressions.event_time_ms, [100_000, 900_500, 900_500, 1_000_000])
    np.testing.assert_array_equal(impressions.impression_id, [0, 1, 2, 3])
    np.testing.assert_array_equal(impressions.request_id, [M, 6, 6, 7])
    np.testing.assert_array_equal(impressions.numerics, np.array([[np.nan], [31], [31], [44]], np.float32))
    np.testing.assert_array_equal(
        block.outcomes, np.array([[0, np.nan, 5], [0, 0, 4], [1, 1, 4.5], [1, 0, np.nan]], np.float32)
    )
    assert block.outcome_time_ms is not None
    np.testing.assert_array_equal(block.outcome_time_ms[:, 2], [130_000, 950_000, M, M])
    assert (block.outcome_time_ms[:, :2] == M).all()


def test_every_row_is_accounted_for(shop_dir: Path, shop_schema: SchemaFile) -> None:
    with open_log(shop_dir, shop_schema) as reader:
        assert reader.total == 4
        assert reader.duplicates == 2  # one in its own file, one in the other
        assert reader.rejected == {
            "user_id (customer) is empty": 1,
            "event_time (shown_at) is no time in s": 1,
            "log.labels.opened (is_open): expected 0 or 1": 1,
            "log.labels.rating (stars): expected a number from 0 to 5 (after scale 1)": 1,
        }
        assert reader.rows_read == reader.total + reader.duplicates + sum(reader.rejected.values()) == 10


def test_lines_that_are_no_rows_are_counted(shop_dir: Path, shop_schema: SchemaFile) -> None:
    with (shop_dir / "visits_part1.csv").open("a") as file:
        file.write("c9,11,2000\nc9,11,2000,1,home,1,0,,,too,many\n")
    with open_log(shop_dir, shop_schema) as reader:
        assert reader.total == 4
        assert [n for reason, n in reader.rejected.items() if "no row of the CSV" in reason] == [2]
        assert reader.rows_read == 12


def test_the_limit_is_the_first_in_time(shop_dir: Path, shop_schema: SchemaFile) -> None:
    with open_log(shop_dir, shop_schema) as everything, open_log(shop_dir, shop_schema, limit=3) as limited:
        assert limited.total == 3
        (block,), (first,) = read(everything), read(limited)
        np.testing.assert_array_equal(first.impressions.ids, block.impressions.ids[:3])
        np.testing.assert_array_equal(first.impressions.impression_id, [0, 1, 2])


def test_block_sizes_change_nothing(shop_dir: Path, shop_schema: SchemaFile) -> None:
    with open_log(shop_dir, shop_schema) as reader:
        (whole,) = read(reader)
        parts = read(reader, rows_per_block=3)
        assert [len(p) for p in parts] == [3, 1]
        np.testing.assert_array_equal(np.concatenate([p.impressions.ids for p in parts]), whole.impressions.ids)


def test_parquet_reads_like_csv(shop_dir: Path, shop_schema: SchemaFile, shop_yaml: Path, tmp_path: Path) -> None:
    """The same log as typed Parquet (numbers, booleans, lists for bags) encodes to the same ids."""
    (folder := tmp_path / "typed").mkdir()
    with duckdb.connect() as connection:
        for name, columns in (
            ("visits_part1", "* REPLACE (is_open::BOOLEAN AS is_open, shown_at::DOUBLE AS shown_at)"),
            ("customers", "* REPLACE (age::SMALLINT AS age)"),
            (
                "products",
                "* REPLACE (sku::DOUBLE AS sku, string_split(words, '|') AS words)",
            ),
        ):
            # Paths of this test's own folder.
            connection.execute(
                f"COPY (SELECT {columns} FROM read_csv('{shop_dir / name}.csv', all_varchar = true)) "
                f"TO '{folder / name}.parquet'"
            )
    text = shop_yaml.read_text().replace(".csv", ".parquet")
    (tmp_path / "typed.yaml").write_text(text)
    (shop_dir / "visits_part2.csv").unlink()
    with open_log(shop_dir, shop_schema) as csv, open_log(folder, load_schema_file(tmp_path / "typed.yaml")) as typed:
        (expected,), (block,) = read(csv), read(typed)
    np.testing.assert_array_equal(block.impressions.ids, expected.impressions.ids)
    np.testing.assert_array_equal(block.impressions.event_time_ms, expected.impressions.event_time_ms)
    np.testing.assert_array_equal(block.outcomes, expected.outcomes)


def test_a_single_file_finds_its_feature_tables_beside_it(shop_dir: Path, shop_schema: SchemaFile) -> None:
    with open_log(shop_dir / "visits_part1.csv", shop_schema) as reader:
        assert reader.total == 3


def test_temporary_files_are_removed(shop_dir: Path, shop_schema: SchemaFile, tmp_path: Path) -> None:
    (temp := tmp_path / "temp").mkdir()
    with open_log(shop_dir, shop_schema, temp_dir=temp) as reader:
        assert reader.total == 4
        assert list(temp.iterdir())
    assert not list(temp.iterdir())


def test_a_missing_column_is_named_with_those_there_are(shop_dir: Path, shop_schema: SchemaFile) -> None:
    products = shop_dir / "products.csv"
    products.write_text(products.read_text().replace("brand", "make"))
    with pytest.raises(LogError, match=r"products\.csv: no column 'brand', expected by log\.features\.brand; .*make"):
        open_log(shop_dir, shop_schema)


def test_a_missing_file_is_named_with_those_there_are(shop_dir: Path, shop_schema: SchemaFile) -> None:
    (shop_dir / "customers.csv").unlink()
    with pytest.raises(LogError, match=r"expected a file named customers\.csv \(log\.user_features\.files\), found"):
        open_log(shop_dir, shop_schema)
    with pytest.raises(LogError, match="no such file or folder"):
        open_log(shop_dir / "nowhere", shop_schema)


def test_a_bad_expression_is_named(shop_dir: Path, shop_yaml: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(shop_yaml.read_text().replace("// 86400000", "// nosuch"))
    with pytest.raises(LogError, match=r"visits_part1\.csv .*log\.features\.weekday.*nosuch"):
        open_log(shop_dir, load_schema_file(bad))


def test_a_column_of_the_wrong_type_is_named(tmp_path: Path, shop_dir: Path, shop_schema: SchemaFile) -> None:
    (tmp_path / "visits.xlsx").write_text("x")
    with pytest.raises(LogError, match=r"visits\.xlsx: expected a file that ends in \.parquet, or in \.csv, \.tsv or"):
        open_log(tmp_path / "visits.xlsx", shop_schema)
    (shop_dir / "broken.parquet").write_text("no parquet")
    with pytest.raises(LogError, match=r"broken\.parquet: expected a table of Parquet"):
        open_log(shop_dir / "broken.parquet", shop_schema)


def test_a_log_with_columns_named_like_ours(tmp_path: Path) -> None:
    """Names that the reader uses itself are free to use."""
    (tmp_path / "odd.csv").write_text("user,item,event_time_ms,row,reason,digest\n5,6,10,1,x,1\n5,6,9,0,y,2\n")
    (tmp_path / "odd.yaml").write_text(
        "name: odd\ntasks: [{name: row}]\nfeatures: [{name: reason}, {name: digest}]\n"
        "log: {user_id: user, item_id: item, event_time: event_time_ms, labels: {row: row}}\n"
    )
    with open_log(tmp_path / "odd.csv", load_schema_file(tmp_path / "odd.yaml")) as reader:
        (block,) = read(reader)
    np.testing.assert_array_equal(block.impressions.event_time_ms, [9, 10])
    np.testing.assert_array_equal(block.impressions.ids, [[5, 6, stable_id("y"), 2], [5, 6, stable_id("x"), 1]])
    np.testing.assert_array_equal(block.outcomes, [[0], [1]])
