"""Text files are split by a rule that is declared and not guessed; each line that is no row is counted and named."""

import csv
import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from simulators.logs.csv_files import line_of_row, prepare
from simulators.logs.ledger import Rejection
from smes.errors import LogError
from smes.hashing import encode_id
from smes_io.log_spec import CsvFormat
from tests.simulators.made_logs import csv_log, ledger, opened, read

ROWS = "user,item,ts,click\nänne,1,1,0\nb,2,2,1\n"


def packed(content: bytes) -> bytes:
    """As a gzip file without the time: it would be another one in each process that collects these tests."""
    return gzip.compress(content, mtime=0)


def assert_is_read(path: Path, log: str = "") -> None:
    """The file holds the impressions of ``ROWS``."""
    block = read(path, log=log)
    assert block.impressions.ids.tolist() == [[encode_id("änne"), 1], [encode_id("b"), 2]]
    assert block.outcomes[:, 0].tolist() == [0, 1]


def test_rows_that_begin_with_a_hash_are_rows(tmp_path: Path) -> None:
    path = csv_log(tmp_path / "log.csv", ["u1,2,3,1", "#2,2,4,0", "u3,2,5,1", "#4,2,6,0"])
    assert read(path).impressions.user_id.tolist() == [encode_id(user) for user in ("u1", "#2", "u3", "#4")]


def test_a_line_before_the_header_is_named_or_declared(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("# exported by a tool\nuser,item,ts,click\nu1,2,3,1\n#2,2,4,0\nu3,2,5,1\n#4,2,6,0\n")
    with pytest.raises(LogError, match=r"the columns are # exported by a tool \(line 1 is taken as the header"):
        read(path)
    assert read(path, log="csv: {skip_lines: 1}").impressions.user_id.tolist() == [
        encode_id(user) for user in ("u1", "#2", "u3", "#4")
    ]


@pytest.mark.parametrize(
    ("name", "content", "log"),
    [
        ("log.csv", ROWS.encode(), ""),
        ("log.txt", ROWS.encode(), ""),
        ("log.tsv", ROWS.replace(",", "\t").encode(), ""),
        ("LOG.TSV", ROWS.replace(",", "\t").encode(), ""),
        ("log.tsv", ROWS.encode(), 'delimiter: ","'),
        ("log.csv", ROWS.replace(",", ";").encode(), 'delimiter: ";"'),
        ("log.csv", ROWS.replace(",", "::").encode(), 'csv: {delimiter: "::"}'),
        ("log.csv", ROWS.replace(",", "\1").encode(), r'csv: {delimiter: "\x01"}'),
        ("log.csv", ROWS.replace("\n", "\r\n").encode(), ""),
        ("log.csv", ROWS.replace("\n", "\r").encode(), ""),
        ("log.csv", ROWS.replace("0\n", "0\r\n").rstrip("\n").encode(), ""),
        ("log.csv", ROWS.replace("\n", "\n\n").encode(), ""),
        ("log.csv", ROWS.encode("utf-8-sig"), ""),
        ("log.csv", ROWS.split("\n", 1)[1].encode("utf-8-sig"), "csv: {names: [user, item, ts, click]}"),
        ("log.csv", ROWS.split("\n", 1)[1].encode(), "csv: {names: [user, item, ts, click]}"),
        ("log.csv", b'a\n\n"b\n' + ROWS.encode(), "csv: {skip_lines: 3}"),
        ("log.csv", ROWS.encode("latin-1"), "csv: {encoding: latin-1}"),
        ("log.csv", ROWS.encode("cp1252"), "csv: {encoding: cp1252}"),
        ("log.csv", ROWS.encode("utf-16"), "csv: {encoding: utf-16}"),
        ("log.csv.gz", packed(ROWS.encode()), ""),
        ("log.csv.gz", packed(ROWS[:30].encode()) + packed(ROWS[30:].encode()), ""),
        ("log.csv.zst", pa.compress(ROWS.encode(), codec="zstd", asbytes=True), ""),
        ("log.tsv.gz", packed(ROWS.replace(",", "\t").encode("latin-1")), "csv: {encoding: latin-1}"),
        ("log.csv", ROWS.replace("b,2", "'b','2'").encode(), 'csv: {quote: "\'"}'),
        ("log.csv", ROWS.replace("user,item", '"user","item"').replace("b,", '"b",').encode(), ""),
    ],
)
def test_what_is_declared_is_read(tmp_path: Path, name: str, content: bytes, log: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert_is_read(path, log)


def test_the_folder_finds_packed_files(tmp_path: Path) -> None:
    (folder := tmp_path / "log").mkdir()
    (folder / "1.csv.gz").write_bytes(packed(b"user,item,ts,click\n1,1,1,0\n"))
    (folder / "2.tsv").write_text("user\titem\tts\tclick\n2\t1\t2\t0\n")
    assert read(folder).impressions.user_id.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("declared", "field", "expected"),
    [
        ("{}", '"a ""b"", c"', 'a "b", c'),
        ("{}", 'a "b" c', 'a "b" c'),
        ("{}", '"a\nb"', "a\nb"),
        ("{}", '"a\r\nb\rc"', "a\r\nb\rc"),
        (r"{escape: '\'}", r'"a \"b\", c"', 'a "b", c'),
        (r"{escape: '\'}", r"a\b", r"a\b"),
        ("{quote: '', escape: ''}", '"a', '"a'),
        ("{quote: ''}", '"a', '"a'),
        ("""{quote: "'", escape: "'"}""", "'it''s'", "it's"),
    ],
)
def test_quotes(tmp_path: Path, declared: str, field: str, expected: str) -> None:
    path = csv_log(tmp_path / "log.csv", [f"{field},1,1,0", "b,1,2,0"])
    assert read(path, log=f"csv: {declared}").impressions.user_id.tolist() == [encode_id(expected), encode_id("b")]


BROKEN = b"""user,item,ts,click
a,1,1,0
b,2,2
c,"3"x,3,0
d,4,4,0,9
\xff,5,5,0
f,"6,6,0
g,7,7,1
h,"8
8",8,0
i,9,9,0
"""


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_lines_that_are_no_rows_are_counted_and_named_and_cost_no_other_line(tmp_path: Path, line_end: bytes) -> None:
    """An opening quote costs its own line only."""
    path = tmp_path / "log.csv"
    path.write_bytes(BROKEN.replace(b"\n", line_end))
    found = ledger(path)
    no_row, behind = (
        "line is no row of the CSV file: ",
        "text behind a closing \", expected a delimiter or the line's end",
    )
    assert set(found.rejections) == {
        Rejection(f"{no_row}wrong number of fields, expected 4", 2, "log.csv", 3, "b,2,2"),
        Rejection(no_row + behind, 2, "log.csv", 4, 'c,"3"x,3,0'),
        Rejection(f"{no_row}bytes that are no text in utf-8", 1, "log.csv", 6, "\ufffd,5,5,0"),
    }
    assert (found.rows, found.usable) == (9, 4)
    assert read(path).impressions.item_id.tolist() == [1, 7, encode_id(f"8{line_end.decode()}8"), 9]


def test_one_stray_quote_in_a_large_file_costs_one_row(tmp_path: Path) -> None:
    rows = [f"u{i},1,{i},0" for i in range(300_000)]
    rows[5] = '"u5,1,5,0'
    found = ledger(csv_log(tmp_path / "log.csv", rows))
    assert (found.rows, found.usable) == (300_000, 299_999)
    assert [(r.rows, r.line) for r in found.rejections] == [(1, 7)]


def test_fields_with_line_ends_are_read_by_several_threads(tmp_path: Path) -> None:
    """DuckDB splits a file of this size among its threads, in the middle of quoted fields too."""
    with (tmp_path / "log.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["user", "item", "ts", "click", "note"])
        writer.writerows([i, "\n1,1,1,1\n" * 40, i, i % 2, '"' * 9] for i in range(100_000))
    with opened(tmp_path / "log.csv") as reader:
        assert reader.total == 100_000
        assert np.concatenate([b.impressions.user_id for b in reader.blocks()]).tolist() == [*range(100_000)]


def test_a_broken_line_of_a_feature_table_is_counted_and_named(tmp_path: Path) -> None:
    csv_log(tmp_path / "log.csv", ["1,1,1,0", "2,2,2,1", "3,3,3,1"])
    (tmp_path / "items.csv").write_text("id,price\n1,5\nbroken,row,too,long\n,4\n3,6\n")
    side = "item_features: {files: items.csv, key: id}"
    (join,) = ledger(tmp_path / "log.csv", features="{name: price, kind: numeric, source: item}", log=side).joins
    assert (join.rows, join.ids_in_log, join.ids_matched, join.impressions_missed) == (4, 3, 2, 1)
    no_row = "line is no row of the CSV file"
    assert set(join.rejections) == {
        Rejection(f"{no_row}: wrong number of fields, expected 2", 1, "items.csv", 3, "broken,row,too,long"),
        Rejection("key (id) is empty", 1, "items.csv", 4, None),
    }


def test_a_feature_table_has_a_header_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("export\n7;1;1;0\n")
    (tmp_path / "items.csv").write_text("id;price\n1;5,0\n")
    (tmp_path / "users.txt").write_text("7|2.5\n")
    log = (
        'csv: {delimiter: ";", skip_lines: 1, names: [user, item, ts, click]}, '
        "item_features: {files: items.csv, key: id}, "
        'user_features: {files: users.txt, key: id, csv: {delimiter: "|", names: [id, age]}}'
    )
    features = "{name: age, kind: numeric, source: user}, {name: price, source: item}"
    impressions = read(tmp_path / "log.csv", features=features, log=log).impressions
    assert impressions.numerics.tolist() == [[2.5]]
    assert impressions.ids.tolist() == [[7, 1, encode_id("5,0")]]


@pytest.mark.parametrize(
    ("name", "content", "log", "message"),
    [
        ("log.csv", b"", "", r"log\.csv: an empty file, expected rows"),
        ("log.csv", b"user,item,USER,ts\n", "", r"log\.csv:1: columns user, USER, expected a header of names"),
        (
            "log.csv",
            ROWS.encode("utf-16"),
            "",
            r"log\.csv: it begins like UTF-16, expected utf-8 \(log\.csv\.encoding\)",
        ),
        ("log.csv", "usér,item".encode("latin-1"), "", r"log\.csv:1: a header that is no utf-8"),
        (
            "log.csv",
            b"user\n",
            "csv: {skip_lines: 3}",
            r"log\.csv: 1 lines, expected the names of the columns in line 4",
        ),
        ("log.csv.gz", b"user", "", r"log\.csv\.gz: .*expected a file that can be unpacked"),
        ("log.csv.gz", packed(ROWS.encode())[:-9], "", r"log\.csv\.gz: .*expected a file that can be unpacked"),
        ("log.csv.zst", b"user", "", r"log\.csv\.zst: .*expected a file that can be unpacked"),
        ("log.csv", b"7,1,3,0\n", "", r"no column 'ts'.*log\.csv\.names is for files without one"),
        ("log.csv", b"7,1,1,0\n", "", r"columns 1, 1, .*or those of a file without a header"),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, name: str, content: bytes, log: str, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(LogError, match=message):
        read(path, log=log)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("delimiter: ''", r"log\.csv\.delimiter: '', expected one to four ASCII characters"),
        ("delimiter: '||||||'", r"log\.csv\.delimiter: "),
        ("quote: '«'", r"log\.csv\.quote: '«', expected one ASCII character"),
        ("encoding: nosuch", r"log\.csv\.encoding: 'nosuch', expected an encoding"),
        ("names: [a, A]", r"log\.csv\.names: \['a', 'A'\], expected names that differ"),
        ("comment: '#'", r"log\.csv\.comment: '#' is an unknown key"),
    ],
)
def test_a_format_that_cannot_be_is_refused(tmp_path: Path, key: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(csv_log(tmp_path / "log.csv", ["1,1,1,0"]), log=f"csv: {{{key}}}")


FIELDS = st.text(st.sampled_from('ab"\n\r,# \t\\é\0'), max_size=6)


@settings(
    max_examples=60,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    deadline=None,
)
@given(rows=st.lists(st.tuples(FIELDS, FIELDS), min_size=1, max_size=20), ends=st.sampled_from(["\n", "\r\n", "\r"]))
def test_what_pythons_csv_module_writes_is_read_back(tmp_path: Path, rows: list[tuple[str, str]], ends: str) -> None:
    path = tmp_path / "log.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator=ends, quoting=csv.QUOTE_ALL)
        writer.writerow(["user", "item", "ts", "click", "a", "b"])
        writer.writerows([1, 1, i, 0, *row] for i, row in enumerate(rows))
    ids = read(path, features="{name: a}, {name: b}", log="null_words: []").impressions.ids[:, 2:]
    missing = int(np.iinfo(np.int64).min)
    assert ids.tolist() == [[encode_id(field) if field else missing for field in row] for row in rows]


@settings(
    max_examples=150,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    deadline=None,
)
@given(text=st.text(st.sampled_from('ab,,"\n\r'), max_size=60))
def test_every_line_is_in_a_row_or_counted(tmp_path: Path, text: str) -> None:
    """Of any text, whatever its quotes: a row for DuckDB, a line that is none, or an empty line."""
    path = tmp_path / "log.csv"
    path.write_bytes(b"a,b\n" + text.encode())
    form = CsvFormat()
    (tmp_path / "text").mkdir(exist_ok=True)
    file = prepare(str(path), form, tmp_path / "text")
    begins = [line_of_row(file, row, form) for row in range(file.scan.rows)]
    assert begins == sorted(set(begins))
    lines = text.splitlines() if "\r" not in text else text.replace("\r\n", "\n").replace("\r", "\n").splitlines()
    filled = {number for number, line in enumerate(lines, 2) if line}
    with Path(file.read).open(encoding="utf-8", newline="") as kept:
        rows = [*csv.reader(kept)][file.skip :]
    inside = sum(field.replace("\r\n", "\n").replace("\r", "\n").count("\n") for row in rows for field in row)
    assert [len(row) for row in rows if row] == [2] * file.scan.rows
    assert set(begins) <= filled
    assert len(filled) <= file.scan.rows + inside + sum(file.scan.bad_lines.values())
