"""``smes check`` on small logs of the kinds that go wrong: it prints what the log holds, or why it is refused."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simulators.logs.ledger import LogLedger, Rejection, problems
from simulators.synthetic import synthesize
from smes_cli import run_estimate
from smes_cli.__main__ import run
from smes_io.clock import wall_clock_ms
from tests.running import read_json, write_config
from tests.simulators.made_movielens import write_movielens

Captured = pytest.CaptureFixture[str]
START_S = 1_600_000_000

SCHEMA = """
name: t
tasks: [{{name: click, window_s: 5}}]
features: [{features}]
log: {{user_id: user, item_id: item, event_time: ts, time_unit: {unit}, labels: {{click: {label}}}{more}}}
"""


def schema(folder: Path, *, features: str = "", unit: str = "s", label: str = "click", more: str = "") -> str:
    path = folder / "s.yaml"
    path.write_text(SCHEMA.format(features=features, unit=unit, label=label, more=f", {more}" if more else ""))
    return str(path)


def csv(path: Path, *rows: str, header: str = "user,item,ts,click") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def good_rows(n: int, start: int = 0) -> list[str]:
    return [f"{i % 7},{i % 5},{START_S + start + i},{i % 2}" for i in range(n)]


def checked(capsys: Captured, log: Path, *arguments: str, status: int = 0) -> tuple[dict[str, Any], str, str]:
    """Run the check; its report, what it printed, and its error."""
    report = log.parent / "ledger.json"
    assert run(["check", str(log), *arguments, "--report", str(report)]) == status
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert printed.err.count("\n") == (status != 0)
    return read_json(report), printed.out, printed.err


def refused(capsys: Captured, log: Path, *arguments: str) -> str:
    """What a check of a log that cannot be read says."""
    assert run(["check", str(log), *arguments]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def column(report: dict[str, Any], name: str) -> dict[str, Any]:
    [found] = [column for column in report["columns"] if column["name"] == name]
    return dict(found)


def row(printed: str, start: str) -> list[str]:
    """The cells of a printed table's row."""
    [line] = [line for line in printed.splitlines() if line.startswith(start)]
    return line.removeprefix(start).split()


# ---- the ledger


def test_a_good_log_is_printed_and_reported(capsys: Captured, tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    csv(tmp_path / "log" / "a.csv", *good_rows(200))
    csv(tmp_path / "log" / "b.csv", *good_rows(100, start=200), good_rows(1, start=200)[0], "x,2,soon,0")
    report, printed, _ = checked(capsys, tmp_path / "log", "--schema", schema(tmp_path))
    assert (
        "300 impressions in 302 rows; 1 exact duplicates dropped, 1 rejected\n7 users, 5 items; event times" in printed
    )
    assert "2020-09-13 12:26:40 … 2020-09-13 12:31:39 UTC" in printed
    assert row(printed, "a.csv") == ["200", "0"]
    assert row(printed, "b.csv") == ["102", "1"]
    assert row(printed, "event_time (ts) is no time in s") == ["1", "b.csv:103", "soon"]
    assert row(printed, "label click") == ["302", "150", "0", "0", "click"]
    assert (report["rows"], report["usable"], report["duplicates"], report["rejected"]) == (302, 300, 1, 1)
    assert report["problems"] == []
    assert report["first_event_ms"] == START_S * 1000


def test_a_limit_bounds_what_is_used_and_not_what_is_counted(capsys: Captured, tmp_path: Path) -> None:
    log = csv(tmp_path / "log.csv", *good_rows(50))
    report, printed, _ = checked(capsys, log, "--schema", schema(tmp_path), "--limit", "20")
    assert (report["rows"], report["usable"], report["used"]) == (50, 50, 20)
    assert "50 impressions in 50 rows, 20 of them within the limit" in printed


def test_many_files_are_summed_up_and_none_is_forgotten(capsys: Captured, tmp_path: Path) -> None:
    (folder := tmp_path / "log").mkdir()
    for part in range(20):
        csv(folder / f"{part:02}.csv", *good_rows(10, start=10 * part))
    report, printed, _ = checked(capsys, folder, "--schema", schema(tmp_path))
    assert row(printed, "and 8 more files") == ["80", "0"]
    assert len(report["files"]) == 20


def test_backtest_prints_and_reports_the_same_ledger(capsys: Captured, tmp_path: Path) -> None:
    world = tmp_path / "world.parquet"
    synthesize(world, 300, seed=3)
    ledger, _, _ = checked(capsys, world)
    path, report = write_config(tmp_path, "redis://unused:1/0", "unused"), tmp_path / "backtest.json"
    assert run(["-c", str(path), "backtest", str(world), "--report", str(report)]) == 0
    printed = capsys.readouterr().out
    assert f"log {world}: 300 impressions in 300 rows" in printed
    assert row(printed, "label click")[0] == "300"
    assert "a value in every row" in printed
    assert read_json(report)["log"] == {
        key: value for key, value in ledger.items() if key not in ("problems", "profile")
    }


def test_replay_prints_and_reports_the_same_ledger(
    capsys: Captured, tmp_path: Path, redis_url: str, namespace: str
) -> None:
    world = tmp_path / "world.parquet"
    synthesize(world, 300, seed=3)
    ledger, _, _ = checked(capsys, world)
    path, report = write_config(tmp_path, redis_url, namespace), tmp_path / "replay.json"
    replay = ["-c", str(path), "replay", "--mark", str(tmp_path / "mark")]
    assert run([*replay, str(world), "--report", str(report)]) == 0
    assert f"log {world}: 300 impressions in 300 rows" in capsys.readouterr().out
    assert read_json(report)["log"] == {
        key: value for key, value in ledger.items() if key not in ("problems", "profile")
    }
    synthesize(world, 300, seed=4)
    assert run([*replay, str(world)]) == 2
    assert "the mark of another replay (log 300 rows" in capsys.readouterr().err


def test_kuairand_is_checked_in_ten_seconds(capsys: Captured, kuairand_dir: Path, tmp_path: Path) -> None:
    started_s = time.process_time()
    assert run(["check", str(kuairand_dir), "--no-estimate", "--report", str(tmp_path / "ledger.json")]) == 0
    assert time.process_time() - started_s < 10
    report = read_json(tmp_path / "ledger.json")
    assert report["usable"] + report["duplicates"] == report["rows"] == 185_061
    assert [(join["ids_in_log"], join["impressions_missed"]) for join in report["joins"]] == [(24_448, 0), (6_153, 0)]


# ---- before the first run


def test_the_published_layout_of_movielens_goes_through_without_an_edit(capsys: Captured, tmp_path: Path) -> None:
    """At most three edits of the proposal are allowed; it takes none. Without its README: test_schema_infer.py."""
    folder = write_movielens(tmp_path / "ml-100k", rows=500)
    proposal, report = tmp_path / "proposed.yaml", tmp_path / "backtest.json"
    assert run(["schema", "infer", str(folder), "--out", str(proposal)]) == 0
    assert f"next: smes check {folder} --schema {proposal}" in capsys.readouterr().out
    found, printed, _ = checked(capsys, folder, "--schema", str(proposal))
    assert (found["usable"], found["rejected"], found["problems"]) == (500, 0, [])
    assert [join["ids_matched"] for join in found["joins"]] == [30, 40]
    assert found["profile"]["run"] is None
    assert "a backtest of all" not in printed
    assert "look at: the first event is of 1997-" in printed
    config = tmp_path / "smes.yaml"
    config.write_text("stream: {batch: {max_age_s: 600000}}")  # as a check advises
    backtest = ["backtest", str(folder), "--schema", str(proposal), "--report", str(report)]
    assert run(["-q", "-c", str(config), *backtest]) == 0
    assert read_json(report)["events"]["trained"] == 500
    assert read_json(report)["tasks"]["rating"]["positives"] == 500


def test_a_proposal_never_replaces_a_file_and_prints_what_it_would_write(capsys: Captured, tmp_path: Path) -> None:
    log = csv(tmp_path / "log.csv", *good_rows(60))
    out = tmp_path / "out.yaml"
    assert run(["schema", "infer", str(log)]) == 0
    printed = capsys.readouterr().out
    out.write_text("mine")
    assert run(["schema", "infer", str(log), "--out", str(out)]) == 2
    assert out.read_text() == "mine"
    assert run(["schema", "infer", str(log), "--out", str(out), "--force"]) == 0
    assert out.read_text() == printed
    capsys.readouterr()
    assert run(["schema", "infer", str(log), "--out", str(tmp_path / "no" / "out.yaml")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_a_check_says_how_long_a_run_will_take(
    capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_estimate, "_BUDGET_S", 0.1)
    world = tmp_path / "world.parquet"
    synthesize(world, 2600, seed=4)
    found, printed, _ = checked(capsys, world)
    expected = found["profile"]["run"]
    assert 0 < expected["measured"] < 2600
    assert expected["seconds"] >= 2600 / expected["impressions_per_s"]
    assert expected["rows"] == sum(found["profile"]["vocabularies"].values())
    assert 50 < expected["resident_mib"] < 20_000
    assert "an estimate from" in printed
    assert checked(capsys, world, "--no-estimate")[0]["profile"]["run"] is None


def test_a_sparse_log_is_told_that_its_mini_batches_are_small(
    capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_estimate, "_BUDGET_S", 0.1)
    rows = [f"{i % 7},{i % 5},{START_S + 600 * i},{i % 2}" for i in range(2200)]
    log = csv(tmp_path / "log.csv", *rows)
    _, printed, _ = checked(capsys, log, "--schema", schema(tmp_path))
    assert "look at: mini-batches hold" in printed


# ---- what no log that is to be trained on may hold


@pytest.mark.parametrize("command", ["check", "backtest", "replay"])
def test_too_many_rejected_rows_are_an_error_before_anything_is_trained_or_appended(
    capsys: Captured, tmp_path: Path, redis_url: str, namespace: str, command: str
) -> None:
    log = csv(tmp_path / "log.csv", *good_rows(97), *["1,2,soon,0"] * 3)
    path = write_config(tmp_path, redis_url, namespace, schema=schema(tmp_path))
    assert run(["-c", str(path), command, str(log)]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "log.csv: 3 of 100 rows are rejected, expected at most 1.00% (log.max_rejected)" in err
    assert "event_time (ts) is no time in s, the first in log.csv:99, which holds 'soon'" in err
    assert run(["-c", str(path), "check", str(log), "--max-rejected", "0.03"]) == 0


def test_the_schema_file_may_allow_more(capsys: Captured, tmp_path: Path) -> None:
    log = csv(tmp_path / "log.csv", *good_rows(97), *["1,2,soon,0"] * 3)
    checked(capsys, log, "--schema", schema(tmp_path, more="max_rejected: 0.03"))


@pytest.mark.parametrize(
    ("seconds", "unit", "hint"),
    [
        (START_S, "ms", "in s it would be 2020-09-13 12:26:40: set log.time_unit: s"),
        (START_S * 1000, "s", "in ms it would be 2020-09-13 12:26:40: set log.time_unit: ms"),
        (START_S * 10**6, "ms", "in us it would be 2020-09-13 12:26:40: set log.time_unit: us"),
        (-START_S, "s", "expected another log.time_unit or column"),
        (4_000_000_000, "s", "runs from 2096-10-02 07:06:40 to"),
    ],
)
def test_times_that_cannot_be_are_an_error_with_a_hint(
    capsys: Captured, tmp_path: Path, seconds: int, unit: str, hint: str
) -> None:
    log = csv(tmp_path / "log.csv", *(f"1,{i},{seconds + i},{i % 2}" for i in range(20)))
    report, _, err = checked(capsys, log, "--schema", schema(tmp_path, unit=unit), status=1)
    assert "20 of 20 rows have a time outside 1995 … a day from now: event_time (ts) in" in err
    assert hint in err
    assert report["outside"] == report["rejected"] == 20


def test_a_single_time_that_cannot_be_costs_its_row_only(capsys: Captured, tmp_path: Path) -> None:
    log = csv(tmp_path / "log.csv", *good_rows(200), "1,2,99999999999,1")
    report, printed, _ = checked(capsys, log, "--schema", schema(tmp_path))
    assert (report["usable"], report["outside"]) == (200, 1)
    assert row(printed, "event_time (ts) is outside 1995 … a day from now") == ["1", "log.csv:202", "99999999999"]


def test_a_log_that_counts_from_zero_is_read_and_says_so(capsys: Captured, tmp_path: Path) -> None:
    log = csv(tmp_path / "log.csv", *(f"1,{i},{i},{i % 2}" for i in range(20)))
    report, printed, _ = checked(capsys, log, "--schema", schema(tmp_path))
    assert report["counts_from_zero"]
    assert "the times count from the log's own beginning" in printed


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_an_empty_log_is_an_error(capsys: Captured, tmp_path: Path, suffix: str) -> None:
    log = csv(tmp_path / "log.csv")
    if suffix == "parquet":
        log = tmp_path / "log.parquet"
        kinds = {"user": pa.int64(), "item": pa.int64(), "ts": pa.int64(), "click": pa.int64()}
        pq.write_table(pa.table({name: pa.array([], kind) for name, kind in kinds.items()}), log)
    _, _, err = checked(capsys, log, "--schema", schema(tmp_path), status=1)
    assert f"{log}: no rows, expected at least one impression" in err


def test_a_label_that_is_empty_in_every_row_is_an_error(capsys: Captured, tmp_path: Path) -> None:
    log = csv(tmp_path / "log.csv", *(f"1,{i},{START_S + i}," for i in range(20)))
    report, _, err = checked(capsys, log, "--schema", schema(tmp_path), status=1)
    assert "log.csv: label click (click): empty in all 20 rows, expected outcomes" in err
    assert column(report, "click")["no_value"] == 20


# ---- the cases of kinds that users report, made here


def test_labels_that_are_nan_or_null_are_no_outcomes(capsys: Captured, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    n = 2000
    rating = np.where(rng.random(n) < 0.3, rng.integers(1, 6, n).astype(float), np.nan)
    columns = {"user": rng.integers(0, 100, n), "item": rng.integers(0, 50, n), "ts": START_S + np.arange(n)}
    with_nan = pa.table({**columns, "rating": rating})
    pq.write_table(with_nan, tmp_path / "nan.parquet")
    pq.write_table(with_nan, tmp_path / "nan_nostats.parquet", write_statistics=False)
    pq.write_table(pa.table({**columns, "rating": pa.array(rating, from_pandas=True)}), tmp_path / "null.parquet")
    label = "{column: rating, threshold: 4}"
    for name in ("nan", "nan_nostats", "null"):
        log = tmp_path / f"{name}.parquet"
        report, printed, _ = checked(capsys, log, "--no-estimate", "--schema", schema(tmp_path, label=label))
        assert row(printed, "label click")[1] == str((rating >= 4).sum()) == "237"
        assert column(report, "click")["no_value"] == np.isnan(rating).sum()
        assert report["rejected"] == 0


def test_texts_that_look_like_numbers_are_different_users(capsys: Captured, tmp_path: Path) -> None:
    users = ["1e2", "10e1", "0100", "100", "+100", "1_00", "01e2"]
    log = csv(tmp_path / "small.csv", *(f"{user},1,{START_S + i},{i % 2}" for i, user in enumerate(users)))
    assert "7 users, 1 items" in checked(capsys, log, "--schema", schema(tmp_path))[1]
    log = csv(tmp_path / "log.csv", *(f"{i:04x},1,{START_S + i},{i % 2}" for i in range(65_536)))
    assert checked(capsys, log, "--no-estimate", "--schema", schema(tmp_path))[0]["users"] == 65_536


def test_ids_of_one_part_are_not_rounded_by_another(capsys: Captured, tmp_path: Path) -> None:
    (folder := tmp_path / "log").mkdir()
    large = [900719925474099301, 900719925474099302, 900719925474099303]
    for day, users in ((1, large), (2, pa.array([5.0, None, 7.0]))):
        times = [START_S + 10 * day + i for i in range(3)]
        table = pa.table({"user": users, "item": [1, 1, 1], "ts": times, "click": [0, 1, 0]})
        pq.write_table(table, folder / f"day{day}.parquet")
    report, printed, err = checked(capsys, folder, "--schema", schema(tmp_path), status=1)
    assert report["users"] == 5
    assert row(printed, "user_id (user) is empty") == ["1", "day2.parquet:2"]
    assert "1 of 6 rows are rejected" in err


def test_a_comment_before_the_header_is_refused_by_its_number(capsys: Captured, tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("# exported by a tool\nuser,item,ts,click\nu1,2,3,1\n#2,2,4,0\nu3,2,5,1\n#4,2,6,0\n")
    said = refused(capsys, log, "--schema", schema(tmp_path))
    assert "line 1 is taken as the header" in said
    report, _, _ = checked(capsys, log, "--schema", schema(tmp_path, more="csv: {skip_lines: 1}"))
    assert (report["usable"], report["users"], report["rejected"]) == (4, 4, 0)


def test_bags_written_as_lists_are_read(capsys: Captured, tmp_path: Path) -> None:
    log = csv(tmp_path / "log.csv", *(f"1,{item},{START_S + item},{item % 2}" for item in (1, 2, 3)))
    csv(
        tmp_path / "items.csv", '1,"[27, 9]","rock, pop"', '2,"[9, 27]","pop, rock"', "3,[8],pop", header="id,feat,tags"
    )
    bags = ", ".join(f"{{name: {name}, kind: bag, max_length: 3, source: item}}" for name in ("feat", "tags"))
    more = "files: log.csv, item_features: {files: items.csv, key: id}"
    report, printed, _ = checked(capsys, log, "--schema", schema(tmp_path, features=bags, more=more))
    assert all(column(report, name)["unreadable"] == 0 for name in ("feat", "tags"))
    assert row(printed, "items") == ["3", "0", "3", "3", "0"]


def test_numbers_that_cannot_be_read_are_counted_by_column(capsys: Captured, tmp_path: Path) -> None:
    numbers = "is_member,price,discount,plain"
    log = csv(
        tmp_path / "log.csv",
        f'1,1,{START_S},1,True,"12,50",5%,7',
        f'2,1,{START_S + 1},0,False,"1,299.00",10%,8',
        header=f"user,item,ts,click,{numbers}",
    )
    features = ", ".join(f"{{name: {name}, kind: numeric}}" for name in numbers.split(","))
    report, _, err = checked(capsys, log, "--schema", schema(tmp_path, features=features), status=1)
    unreadable = {name: column(report, name)["unreadable"] for name in numbers.split(",")}
    assert unreadable == {"is_member": 0, "price": 2, "discount": 2, "plain": 0}
    assert "feature price (price): '12,50' in log.csv:2, and no readable value in all 2 rows" in err
    assert "feature discount (discount): '5%' in log.csv:2" in err


def test_a_part_file_without_the_label_is_refused_or_counted(capsys: Captured, tmp_path: Path) -> None:
    (folder := tmp_path / "log").mkdir()
    for day in (1, 2):
        n = 100
        columns = {"user": np.arange(n), "item": np.arange(n), "ts": START_S + 1000 * day + np.arange(n)}
        pq.write_table(pa.table(columns | ({"click": np.arange(n) % 2} if day == 1 else {})), folder / f"{day}.parquet")
    said = refused(capsys, folder, "--schema", schema(tmp_path))
    assert "2.parquet: no column 'click', expected by log.labels.click" in said
    report, _, _ = checked(capsys, folder, "--schema", schema(tmp_path, label="{column: click, optional: true}"))
    assert column(report, "click") | {"no_value": 100, "positives": 50, "rows": 200} == column(report, "click")


def test_a_feature_table_is_counted_against_the_log(capsys: Captured, tmp_path: Path) -> None:
    log = csv(tmp_path / "log.csv", *(f"{i},{i},{START_S + i},{i % 2}" for i in (1, 2, 3)))
    csv(tmp_path / "broken.csv", "1,5", "broken,row,too,long", "3,6", header="id,price")
    csv(tmp_path / "nothing.csv", "item_1,5", "item_2,6", header="id,price")
    price = "{name: price, kind: numeric, source: item}"

    def of(table: str) -> str:
        more = f"files: log.csv, item_features: {{files: {table}, key: id}}"
        return schema(tmp_path, features=price, more=more)

    _, printed, _ = checked(capsys, log, "--schema", of("broken.csv"))
    assert row(printed, "items") == ["3", "0", "3", "2", "1"]
    assert "broken.csv:3" in printed
    assert "wrong number of fields, expected 2" in printed
    _, _, err = checked(capsys, log, "--schema", of("nothing.csv"), status=1)
    assert "0 of 3 items are in the table log.item_features, expected keys that are item ids of the log" in err


def test_a_share_of_rejected_rows_is_compared_with_all_rows() -> None:
    """One in a hundred is allowed, one in ninety-nine is not."""
    now_ms = wall_clock_ms()

    def found(rejected: int, rows: int) -> list[str]:
        rejections = (Rejection("no time", rejected, "f.csv", 2, "soon"),)
        ledger = LogLedger(
            where="f.csv",
            files=(),
            rows=rows,
            usable=rows - rejected,
            used=rows - rejected,
            users=1,
            items=1,
            duplicates=0,
            outside=0,
            rejections=rejections,
            columns=(),
            joins=(),
            first_event_ms=now_ms,
            last_event_ms=now_ms,
            time_column="ts",
            time_unit="s",
        )
        return problems(ledger, max_rejected=0.01, now_ms=now_ms)

    assert found(1, 100) == []
    assert len(found(1, 99)) == 1
