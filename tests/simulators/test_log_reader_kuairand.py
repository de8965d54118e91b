"""The reader on real KuaiRand files, against a naive reading with the csv module."""

import csv
import math
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulators.logs.reader import LogBlock, LogReader, open_log
from smes.hashing import stable_id
from smes.schema import MISSING
from smes_io.schema_file import SchemaFile, load_builtin

pytestmark = pytest.mark.kuairand

ROWS = 12_000  # of the log's first 40,000 lines, so that ties, duplicates and users mix
HEAD_LINES = 40_000
BEIJING = timezone(timedelta(hours=8))
NAN = float("nan")
Row = dict[str, str]


@pytest.fixture(scope="module")
def head_dir(kuairand_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The head of the log in two parts, as KuaiRand-27K splits it, with the whole feature tables."""
    folder = tmp_path_factory.mktemp("kuairand")
    log = sorted(kuairand_dir.glob("log_standard_*.csv"))[0]
    with log.open() as file:
        header = file.readline()
        lines = [file.readline() for _ in range(HEAD_LINES)]
    half = len(lines) // 2
    for part, chosen in ((1, lines[:half]), (2, lines[half:])):
        (folder / f"log_standard_4_22_to_5_08_27k_part{part}.csv").write_text(header + "".join(chosen))
    (folder / "log_random_4_22_to_5_08_27k.csv").write_text(header + lines[0])
    for pattern in ("user_features_*.csv", "video_features_basic_*.csv"):
        for table in kuairand_dir.glob(pattern):
            (folder / table.name).symlink_to(table)
    return folder


@pytest.fixture(scope="module")
def schema_file() -> SchemaFile:
    return load_builtin("kuairand")


@pytest.fixture(scope="module")
def reader(head_dir: Path, schema_file: SchemaFile) -> Iterator[LogReader]:
    with open_log(head_dir, schema_file, limit=ROWS, memory_limit="256MB", threads=1) as reader:
        yield reader


@pytest.fixture(scope="module")
def naive(head_dir: Path) -> tuple[list[Row], int]:
    """The first rows in time order without duplicates, and how many duplicates there were."""
    rows = [row for path in sorted(head_dir.glob("log_standard_*.csv")) for row in read_csv(path)]
    seen: dict[tuple[str, ...], Row] = {}
    for row in rows:
        seen.setdefault(tuple(row.values()), row)
    unique = sorted(seen.values(), key=lambda row: int(row["time_ms"]))  # Python's sort is stable
    return unique[:ROWS], len(rows) - len(unique)


@pytest.fixture(scope="module")
def block(reader: LogReader) -> LogBlock:
    (block,) = reader.blocks(ROWS)
    return block


def row_time_days(row: Row) -> float:
    return int(row["time_ms"]) / 86_400_000


def row_days(day: str) -> float:
    """Days since 1970 of a day's beginning in Beijing."""
    return datetime.fromisoformat(day).replace(tzinfo=BEIJING).timestamp() / 86_400


def read_csv(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def encoded(text: str) -> int:
    """The id of a value, naively."""
    if text == "":
        return MISSING
    try:
        return int(float(text))
    except ValueError:
        return stable_id(text)


def test_sorted_without_duplicates(reader: LogReader, naive: tuple[list[Row], int], block: LogBlock) -> None:
    rows, duplicates = naive
    assert duplicates > 100
    assert reader.duplicates == duplicates
    assert reader.rows_read == HEAD_LINES
    assert reader.total == ROWS
    assert not reader.rejected
    np.testing.assert_array_equal(block.impressions.event_time_ms, [int(r["time_ms"]) for r in rows])
    np.testing.assert_array_equal(block.impressions.user_id, [int(r["user_id"]) for r in rows])
    np.testing.assert_array_equal(block.impressions.item_id, [int(r["video_id"]) for r in rows])
    np.testing.assert_array_equal(block.impressions.impression_id, np.arange(ROWS))


@pytest.mark.parametrize(
    ("task", "column"),
    [("click", "is_click"), ("long_view", "long_view"), ("hate", "is_hate"), ("profile_enter", "is_profile_enter")],
)
def test_binary_outcomes(
    schema_file: SchemaFile, naive: tuple[list[Row], int], block: LogBlock, task: str, column: str
) -> None:
    outcomes = block.outcomes[:, schema_file.schema.task_index[task]]
    np.testing.assert_array_equal(outcomes, [float(r[column]) for r in naive[0]])


def test_watch_time_is_in_seconds(schema_file: SchemaFile, naive: tuple[list[Row], int], block: LogBlock) -> None:
    outcomes = block.outcomes[:, schema_file.schema.task_index["watch_time"]]
    np.testing.assert_allclose(outcomes, [int(r["play_time_ms"]) / 1000 for r in naive[0]], rtol=1e-6)


def test_every_joined_id_feature(
    schema_file: SchemaFile, naive: tuple[list[Row], int], block: LogBlock, head_dir: Path
) -> None:
    """All features that are a plain column of a feature table, for every row."""
    users = {r["user_id"]: r for r in read_csv(next(head_dir.glob("user_features_*.csv")))}
    videos = {r["video_id"]: r for r in read_csv(next(head_dir.glob("video_features_basic_*.csv")))}
    assert schema_file.log is not None
    checked = 0
    for feature in schema_file.schema.id_features[2:]:
        if feature.source == "context" or feature.kind != "id" or feature.name in schema_file.log.features:
            continue
        table, key = (users, "user_id") if feature.source == "user" else (videos, "video_id")
        expected = [encoded(table.get(r[key], {}).get(feature.name, "")) for r in naive[0]]
        column = block.impressions.ids[:, schema_file.schema.id_slices[feature.name].start]
        np.testing.assert_array_equal(column, expected, err_msg=feature.name)
        checked += 1
    assert checked >= 30


def test_bags_numerics_and_expressions(
    schema_file: SchemaFile, naive: tuple[list[Row], int], block: LogBlock, head_dir: Path
) -> None:
    users = {r["user_id"]: r for r in read_csv(next(head_dir.glob("user_features_*.csv")))}
    videos = {r["video_id"]: r for r in read_csv(next(head_dir.glob("video_features_basic_*.csv")))}
    slices = schema_file.schema.id_slices
    numerics = {f.name: i for i, f in enumerate(schema_file.schema.numeric_features)}
    for i, row in enumerate(naive[0]):
        ids, values = block.impressions.ids[i], block.impressions.numerics[i]
        video: dict[str, Any] = videos.get(row["video_id"], {})
        user: dict[str, Any] = users.get(row["user_id"], {})
        tags = [int(t) for t in video.get("tag", "").split(",") if t][:4]
        assert ids[slices["tag"]].tolist() == tags + [MISSING] * (4 - len(tags))
        assert ids[slices["hour"].start] == (int(row["time_ms"]) // 3_600_000 + 8) % 24
        uploaded = video.get("upload_dt")
        age = NAN if not uploaded else row_time_days(row) - row_days(uploaded)
        np.testing.assert_allclose(values[numerics["item_age_d"]], age, atol=0.01)
        assert ids[slices["is_live_streamer"].start] == (1 if user.get("is_live_streamer") == "1" else MISSING)
        assert ids[slices["tab"].start] == int(row["tab"])
        duration = float(video.get("video_duration") or "nan") / 1000
        np.testing.assert_allclose(values[numerics["duration_s"]], duration, rtol=1e-6)
        bucket = MISSING if math.isnan(duration) else math.floor(2 * math.log2(1 + duration))
        assert ids[slices["duration_bucket"].start] == bucket
        assert values[numerics["fans_user_num"]] == float(user.get("fans_user_num") or "nan")


def test_the_hour_is_beijing_time(schema_file: SchemaFile, naive: tuple[list[Row], int], block: LogBlock) -> None:
    """``hourmin`` is Beijing time rounded to the hour: at most one hour after the hour itself."""
    hour = block.impressions.ids[:, schema_file.schema.id_slices["hour"].start]
    published = np.array([int(r["hourmin"]) // 100 for r in naive[0]])
    assert set(np.unique((published - hour) % 24)) <= {0, 1}


def test_the_random_log_is_read_only_when_named(head_dir: Path, schema_file: SchemaFile) -> None:
    with open_log(head_dir / "log_random_4_22_to_5_08_27k.csv", schema_file) as reader:
        assert reader.rows_read == 1
