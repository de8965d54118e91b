"""``smes features`` on a real server: what is put, by hand or from a file, is what is shown, and mistakes are named."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smes.hashing import encode_id
from smes_cli.__main__ import run
from tests.running import write_config

Captured = pytest.CaptureFixture[str]
SCHEMA = """
name: shop
tasks: [{name: click}]
features:
  - {name: band, source: user}
  - {name: tags, kind: bag, max_length: 3, source: item}
  - {name: price, kind: numeric, source: item}
log: {files: ["*.csv"], user_id: user, item_id: item, event_time: at, time_unit: s, labels: {click: {column: click}}}
"""


class Features:
    """``smes features``, and what it printed."""

    def __init__(self, path: Path, capsys: Captured) -> None:
        self._path, self._capsys = path, capsys

    def __call__(self, *arguments: str) -> str:
        assert run(["-c", str(self._path), "features", *arguments]) == 0, self._capsys.readouterr().err
        return self._capsys.readouterr().out

    def refused(self, *arguments: str, status: int = 2) -> str:
        assert run(["-c", str(self._path), "features", *arguments]) == status
        return self._capsys.readouterr().err

    def rows(self, *arguments: str) -> list[Any]:
        return [(row["since"], row["features"]) for row in json.loads(self("get", *arguments))["rows"]]


@pytest.fixture
def features(tmp_path: Path, redis_url: str, namespace: str, capsys: Captured) -> Features:
    schema = tmp_path / "shop.yaml"
    schema.write_text(SCHEMA)
    path = write_config(tmp_path, redis_url, namespace, schema=str(schema), feature_store={"feature_versions": 3})
    return Features(path, capsys)


def test_rows_put_by_hand_are_shown_by_time(features: Features) -> None:
    assert (
        features("put", "item", "mug", "tags=5,blue", "price=9.5", "--time", "always") == "features of item mug put\n"
    )
    features("put", "item", "mug", '{"tags": ["blue"], "price": 8}', "--time", "2026-01-01T00:00")
    features("put", "item", "mug", "tags=", "price=7.25", "--time", "2026-01-03T00:00")

    blue = encode_id("blue")
    first = ("always", {"tags": [5, blue], "price": 9.5})
    second = ("2026-01-01 00:00:00", {"tags": [blue], "price": 8.0})
    third = ("2026-01-03 00:00:00", {"tags": [], "price": 7.25})
    assert features.rows("item", "mug") == [third, second, first]
    assert features.rows("item", "mug", "--time", "2026-01-02") == [second]

    features("put", "item", "mug", "price=6", "--time", "2026-01-02T00:00")
    assert [since for since, _ in features.rows("item", "mug")][-1] == "2026-01-01 00:00:00"
    assert "1 of them not kept: the store has 3 newer rows" in features("put", "item", "mug", "{}", "--time", "always")
    assert "item mug: no features in Redis that held at always" in features.refused(
        "get", "item", "mug", "--time", "always", status=1
    )
    assert "user 7: no features in Redis" in features.refused("get", "user", "7", status=1)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_file_of_rows_is_put_and_its_faults_are_named(features: Features, tmp_path: Path, kind: str) -> None:
    def write(name: str, rows: list[dict[str, Any]]) -> str:
        path = tmp_path / f"{name}.{kind}"
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    at_ms = 1_767_225_600_000  # 2026-01-01
    rows: list[dict[str, Any]]
    rows = [{"item_id": i, "tags": [i, i + 1], "price": i / 4, "time_ms": at_ms if i else None} for i in range(6001)]

    out = features("put", "item", "--file", write("good", rows), "--time", "2026-01-02")

    assert out.endswith("6,001 rows of item features put\n")
    assert features.rows("item", "6000") == [("2026-01-01 00:00:00", {"tags": [6000, 6001], "price": 1500.0})]
    assert features.rows("item", "0") == [("2026-01-02 00:00:00", {"tags": [0, 1], "price": 0.0})]

    rows[5500]["price"] = None if kind == "parquet" else "dear"
    if kind == "parquet":
        rows[5500]["item_id"] = None
        expected = "row 5,501: item_id: missing, expected an id (5,000 rows before were put; with --time 17"
    else:
        expected = "row 5,501: price: 'dear', expected a number (5,000 rows before were put; with --time 17"
    assert expected in features.refused("put", "item", "--file", write("bad", rows))

    unknown = write("unknown", [{"item_id": 1, "price": 2.0, "colour": "red"}])
    assert "colour: no item feature, expected one of price, tags" in features.refused("put", "item", "--file", unknown)
    assert features("put", "item", "--file", unknown, "--skip-unknown").startswith("1 rows of item features")

    broken = tmp_path / f"broken.{kind}"
    broken.write_bytes(b'{"item_id": 1}\nnonsense\n')
    named = "expected a Parquet file" if kind == "parquet" else "line 2: no JSON"
    assert named in features.refused("put", "item", "--file", str(broken))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["put", "shop", "1"], "'shop': expected user or item"),
        (["put", "user"], "expected either an id and its features, or --file"),
        (["put", "user", "1"], "features of user 1: none, expected NAME=VALUE"),
        (["put", "user", "1", "price=3"], "price: no user feature, expected one of band"),
        (["put", "item", "1", "price=dear"], "price: 'dear', expected a number"),
        (["put", "item", "1", "price"], "'price': expected NAME=VALUE, or one JSON object"),
        (["put", "item", "1", '{"price": '], "no JSON"),
        (["put", "item", "1", "price=1", "--time", "1700000000"], "--time '1700000000': expected a time"),
        (["put", "item", "1", "price=1", "--time", "1999-01-01"], "expected 0 or Unix milliseconds from 946684800000"),
    ],
)
def test_mistakes_are_named(features: Features, arguments: list[str], message: str) -> None:
    assert message in features.refused(*arguments)
