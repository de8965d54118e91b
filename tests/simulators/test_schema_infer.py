"""A schema file is proposed for a log that nobody has described, and the reader takes it as it is."""

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simulators.logs import infer_tables
from simulators.logs.infer import propose
from simulators.logs.infer_format import text_layout
from simulators.logs.infer_roles import Hints
from simulators.logs.infer_text import schema_text
from simulators.logs.reader import open_log
from smes.errors import LogError
from smes.schema import Feature
from smes_io.schema_file import SchemaFile, load_schema_file
from tests.simulators.made_movielens import GENRES, write_movielens

N = 240
RNG = np.random.default_rng(0)
USER, ITEM = RNG.integers(0, 24, N), RNG.integers(0, 18, N)
TIME_S = 1_700_000_000 + 7 * np.arange(N)
CLICK = (RNG.random(N) < 0.4).astype(int)
PLAIN = {"user": USER, "item": ITEM, "ts": TIME_S, "click": CLICK}
PRICE = np.exp(RNG.normal(size=18)).round(2)[ITEM]


def text(columns: Mapping[str, Any], sep: str = ",", end: str = "\n", *, header: bool = True) -> str:
    rows = [*([list(columns)] if header else []), *zip(*columns.values(), strict=True)]
    return "".join(sep.join(map(str, row)) + end for row in rows)


def proposed(folder: Path, hints: Hints | None = None) -> tuple[SchemaFile, str]:
    """The schema file that is proposed for a log, which reads every row of it."""
    written = schema_text(propose(folder, hints))
    path = folder.parent / "proposed.yaml"
    path.write_text(written, encoding="utf-8")
    schema_file = load_schema_file(path)
    with open_log(folder, schema_file, threads=1) as reader:
        reader.check()
        assert reader.rejected == {} or "max_rejected: 0.31  # ? up to 25.0% of the rows" in written
    return schema_file, written


def features(schema_file: SchemaFile) -> dict[str, Feature]:
    return {f.name: f for f in schema_file.features}


def wrote(folder: Path, **files: str | bytes) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        (folder / name.replace("__", ".")).write_bytes(data)
    return folder


@pytest.mark.parametrize("readme", [True, False])
def test_the_layout_of_movielens_is_read_as_proposed(tmp_path: Path, readme: bool) -> None:
    folder = write_movielens(tmp_path / "ml-100k", rows=700, readme=readme)
    schema_file, written = proposed(folder)
    log, found = schema_file.log, features(schema_file)
    assert log is not None
    assert log.files == ("u.data",)
    assert (log.csv.delimiter, log.time_unit) == ("\t", "s")
    assert log.item_features is not None
    assert log.item_features.csv is not None
    assert (log.item_features.csv.delimiter, log.item_features.csv.encoding) == ("|", "latin-1")
    assert [(t.kind, t.max_value) for t in schema_file.tasks][1] == ("regression", 5.0)
    assert next(iter(log.labels.values())).threshold == 4
    assert (found["genre"].kind, found["genre"].source) == ("bag", "item")
    assert [f.source for f in schema_file.features if f.elapsed] == ["item"]
    if readme:
        assert {"age", "gender", "occupation", "zip_code"} <= {*found}
        assert found["age"].kind == "numeric"
        assert "the names of the columns come from README" in written
    with open_log(folder, schema_file) as reader:
        assert (reader.ledger.usable, reader.ledger.rejections) == (700, ())
        assert [join.ids_matched for join in reader.ledger.joins] == [30, 40]
        (items,) = reader.entity_blocks("item")
    flags = [line.split("|")[5:] for line in (folder / "u.item").read_text("latin-1").splitlines()]
    ones = np.array(flags, int).sum(axis=1)
    order = np.argsort(items.ids)
    np.testing.assert_array_equal((items.columns["genre"][order] >= 0).sum(axis=1), ones)
    assert len({*items.columns["genre"].ravel()}) - 1 == (np.array(flags, int).sum(axis=0) > 0).sum() <= len(GENRES)


def test_columns_of_every_kind_find_their_place(tmp_path: Path) -> None:
    """Outcomes become labels, what tells them too well is left out, and what goes with an item is the item's."""
    leak = np.where(CLICK > 0, RNG.integers(1, 5, N), 0)
    happened = [str(t + 4 + k % 5) if c else "" for k, (t, c) in enumerate(zip(TIME_S, CLICK, strict=True))]
    columns = {
        "request_id": np.arange(N) // 3,
        "customer": [f"c{u}" for u in USER[np.arange(N) // 3]],
        "sku": ITEM,
        "shown_at": TIME_S,
        "price": PRICE,
        "tags": ["|".join("abc"[: 1 + i % 3]) for i in ITEM],
        "page": RNG.integers(3, size=N),
        "landing": leak,
        "is_new": RNG.integers(0, 2, N),
        "clicked": CLICK,
        "clicked_at": happened,
        "play_time_ms": RNG.integers(0, 90_000, N),
        "empty": [""] * N,
    }
    schema_file, written = proposed(wrote(tmp_path / "shop", log__csv=text(columns)))
    log, found = schema_file.log, features(schema_file)
    assert log is not None
    assert (log.user_id, log.item_id, log.event_time, log.request_id) == ("customer", "sku", "shown_at", "request_id")
    assert {n: (f.kind, f.source) for n, f in found.items()} == {
        "price": ("numeric", "item"),
        "tags": ("bag", "item"),
        "page": ("id", "context"),
    }
    assert (found["tags"].max_length, log.labels["clicked"].time_column) == (3, "clicked_at")
    assert {t.name: t.window_s for t in schema_file.tasks}["clicked"] == 10
    assert log.labels["play_time"].scale == 0.001
    for said in ("landing: alone it tells clicked", "is_new: 0 and 1", "empty: empty"):
        assert said in written


def test_files_of_other_makes_are_read_as_proposed(tmp_path: Path) -> None:
    german = {
        "Kunde": [f"ü{u}" for u in USER],
        "ProductID": ITEM,
        "Datum": [str(np.datetime64(int(t), "s")) for t in TIME_S],
        "Preis": [str(p).replace(".", ",") for p in PRICE],
        "clicked": CLICK,
    }
    made: dict[str, dict[str, str | bytes]] = {
        "semicolons": {"log__csv": text(german, ";").encode("utf-8")},
        "utf-16": {"log__csv": text(german, ";").encode("utf-16")},
        "bom": {"log__csv": b"\xef\xbb\xbf" + text(PLAIN, end="\r\n").encode()},
        "packed": {"log__csv__gz": gzip.compress(text(PLAIN).encode())},
        "preface": {"log__txt": "# made by hand\n\n" + text(PLAIN, "\t")},
        "twice": {
            "log__csv": text(PLAIN).replace("click", "click,click", 1).replace("\n", ",0\n").replace(",0", "", 1)
        },
        "null words": {"log__csv": text({**PLAIN, "price": ["n/a" if k % 5 == 0 else 1.5 * k for k in range(N)]})},
        "anonymous": {"log__csv": text({**PLAIN, "user": ["NA" if k % 4 == 0 else k % 17 for k in range(N)]})},
        "odd names": {
            "log [1]__csv": text({"User ID": USER, "Item: ID": ITEM, "Event Time": TIME_S, "Is Click": CLICK})
        },
        "from zero": {"log__csv": text({**PLAIN, "ts": 1000 * np.arange(N)}).replace("ts", "time_ms", 1)},
        "beside noise": {
            "log__csv": text(PLAIN),
            "a__csv": bytes(RNG.integers(0, 256, 999, dtype=np.uint8)),
            "b__parquet": b"PAR1",
            "c__csv": b"",
        },
    }
    for name, files in made.items():
        schema_file, _ = proposed(wrote(tmp_path / name, **files))
        assert schema_file.tasks[0].name in ("click", "clicked"), name
        if "Preis" in str(schema_file.log):
            assert features(schema_file)["preis"].kind == "numeric"


def test_a_ratings_dump_with_two_colons_and_splits_is_read(tmp_path: Path) -> None:
    ratings = text({"u": USER + 1, "i": ITEM + 1, "r": RNG.integers(1, 6, N), "t": TIME_S}, "::", header=False)
    films = "".join(f"{k}::Film {k} of many words (1999)::{'|'.join('ABC'[: 1 + k % 3])}\n" for k in range(1, 20))
    readme = "UserID::MovieID::Rating::Timestamp\n\ntext\n\nMovieID::Title::Genres\n"
    folder = wrote(tmp_path / "ml", ratings__dat=ratings, movies__dat=films, README=readme, test__dat=ratings[:2000])
    schema_file, _ = proposed(folder)
    assert schema_file.log is not None
    assert schema_file.log.files == ("ratings.dat",)
    assert features(schema_file)["genres"].kind == "bag"


def test_parquet_of_many_types_is_read_as_proposed(tmp_path: Path) -> None:
    table = {
        "user": USER.astype(float),
        "item": [f"i{i}" for i in ITEM],
        "at": pa.array(TIME_S * 10**6, pa.timestamp("us")),
        "liked": pa.array(CLICK.astype(bool)),
        "words": pa.array([[1, 2, int(k % 3)] for k in range(N)]),
        "place": pa.array([{"city": "x"}] * N),
        "nothing": pa.nulls(N),
    }
    (tmp_path / "log").mkdir()
    for k in range(8):
        pq.write_table(pa.table(table).slice(k * 30, 30), tmp_path / "log" / f"part-{k}.parquet")
    schema_file, written = proposed(tmp_path / "log")
    assert schema_file.log is not None
    assert schema_file.log.files == ("part-*.parquet",)
    assert schema_file.log.time_unit == "timestamp"
    assert features(schema_file)["words"].max_length == 3
    assert "place: STRUCT" in written


@pytest.mark.parametrize(
    ("columns", "hints", "message"),
    [
        ({"user": USER, "item": ITEM, "click": CLICK}, Hints(), "no column holds times from 1995 to now"),
        (
            {"user": USER, "item": ITEM, "ts": TIME_S, "event_type": ["v"] * N},
            Hints(),
            "no column looks like an outcome",
        ),
        ({"user": USER, "item": ITEM, "ts": TIME_S, "clicked": ["y", "n"] * (N // 2)}, Hints(), "clicked holds n, y"),
        ({"user": USER, "ts": TIME_S, "click": CLICK}, Hints(), "no column looks like the id of the item"),
        (
            {"user": USER, "item": ITEM, "ts": TIME_S, "click": CLICK},
            Hints(labels=("x",)),
            "no column 'x'; the columns",
        ),
        ({"user": USER[:1], "item": ITEM[:1], "ts": TIME_S[:1], "click": CLICK[:1]}, Hints(), "1 row, expected more"),
        (PLAIN, Hints(user="item", item="item"), "column 'item' as user and item, expected two"),
        (
            {**PLAIN, "text": ["a", "b"] * (N // 2)},
            Hints(labels=("text",)),
            "column 'text' as an outcome, expected one",
        ),
        ({"words": ["of prose"]}, Hints(), "no file that can be read as a table"),
    ],
)
def test_what_no_log_can_be_made_of_is_refused_by_what_it_lacks(
    tmp_path: Path, columns: dict[str, Any], hints: Hints, message: str
) -> None:
    with pytest.raises(ValueError if hints != Hints() else LogError, match=message):
        propose(wrote(tmp_path / "log", log__csv=text(columns)), hints)


def test_hints_decide_what_names_do_not(tmp_path: Path) -> None:
    columns = {"a": USER, "b": ITEM, "c": TIME_S, "d": TIME_S + 3, "e": RNG.integers(0, 9, N), "f": CLICK}
    folder = wrote(tmp_path / "log", log__csv=text(columns))
    schema_file, _ = proposed(folder, Hints(user="b", item="a", time="d", labels=("f",)))
    assert schema_file.log is not None
    assert (schema_file.log.user_id, schema_file.log.item_id, schema_file.log.event_time) == ("b", "a", "d")
    assert [label.column for label in schema_file.log.labels.values()] == ["f"]


def test_numbers_of_rows_are_no_users_and_no_features(tmp_path: Path) -> None:
    rows = {"nr": [f"n{n}" for n in range(N)], "kunde": USER + 100, "artikel": [f"a{i}" for i in ITEM]}
    folder = wrote(tmp_path / "log", log__csv=text({**rows, "gezeigt": TIME_S, "click": CLICK}))

    schema_file, written = proposed(folder)

    assert schema_file.log is not None
    assert (schema_file.log.user_id, schema_file.log.item_id) == ("kunde", "artikel")
    assert "nr" not in features(schema_file)
    assert "nr: another text in each row: the impression's own id (impression_id)?" in written


def test_of_a_large_file_pieces_from_all_over_it_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log sorted by user shows users of its beginning and of its end."""
    monkeypatch.setattr(infer_tables, "SAMPLE_BYTES", 12_000)
    rows = 4000
    columns = {"user": np.arange(rows) // 20, "item": np.arange(rows) % 50, "ts": 1_700_000_000 + np.arange(rows)}
    folder = wrote(tmp_path / "log", log__csv=text({**columns, "click": np.arange(rows) % 2}))
    proposal = propose(folder)
    assert proposal.log.sampled
    assert 300 < proposal.log.rows < 1500
    assert proposal.span_s > 0.95 * rows
    assert "a sample of" in schema_text(proposal)


letters = st.characters(categories=("L", "Nd", "Zs"), max_codepoint=0xFF)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["\t", ",", ";", "|", "::"]),
    st.booleans(),
    st.sampled_from(["utf-8", "latin-1", "utf-16"]),
    st.lists(st.tuples(st.text(letters, max_size=6), st.integers(0, 99)), min_size=4, max_size=9),
)
def test_a_file_is_split_as_it_was_written(
    tmp_path: Path, delimiter: str, header: bool, encoding: str, rows: list[tuple[str, int]]
) -> None:
    names = ["word" + delimiter + "n" + delimiter + "x"] if header else []
    lines = [*names, *(f"{word.strip() or 'x'}{delimiter}{n}{delimiter}1.5" for word, n in rows)]
    path, written = tmp_path / "log.csv", "\n".join(lines) + "\n"
    path.write_bytes(written.encode(encoding))

    layout = text_layout(path)

    assert layout is not None
    assert layout.csv.delimiter == delimiter
    assert layout.columns == (("word", "n", "x") if header else (None,) * 3)
    data = path.read_bytes()
    try:
        expected = written if encoding == "utf-16" else data.decode()  # some latin-1 is UTF-8, too
    except UnicodeDecodeError:
        expected = written
    assert data.decode(layout.csv.encoding) == expected
