"""A backtest that trains before the windows close: the same labels are counted, and a task that is none is refused."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from simulators.logs.reader import LogReader
from simulators.merge import replay_blocks
from simulators.synthetic import synthesize
from smes.errors import LogError
from smes.events import FeedbackBlock, ImpressionBlock
from smes_cli.__main__ import run
from smes_cli.backtest import run_backtest
from smes_cli.building import build_evaluation
from smes_cli.config import load_config
from tests.running import write_config
from trainer.history import read_history
from trainer.report import TrainingReport, conservation_errors

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("delayed") / "world.parquet"
    synthesize(path, 3000, seed=6)
    return path


def backtest(tmp_path: Path, world: Path, wait: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The report, and the positives of each task by a baseline that is the same ranker on the same examples."""
    config = load_config(write_config(tmp_path, "redis://unused:1/0", "unused"), {"SMES_STREAM__JOIN__WAIT": wait})
    history = tmp_path / "history"
    result = run_backtest(
        config, world, limit=None, seed=0, baseline="smes", should_stop=lambda: False, history=history
    )
    assert result.baseline is not None
    assert_adds_up(history, result.report)
    return result.report.to_dict(), {name: task["positives"] for name, task in result.baseline["tasks"].items()}


def assert_adds_up(history: Path, report: TrainingReport) -> None:
    """The metrics over time of a run, in a folder that has those of others, too, add up to its report."""
    lines = [line for line in read_history(history) if line["lineage"] == report.lineage]
    assert [line["stretch"] for line in lines] == list(range(len(lines)))
    assert lines[-1]["step"] == report.version
    assert sum(line["windows"] for line in lines) > 4
    for name, task in report.tasks.items():
        of_task = [line["tasks"][name] for line in lines]
        assert sum(each["positives"] for each in of_task) == task.positives
        if task.gauc_windowed is not None:
            ranked = [(each["ranked"], each["gauc_windowed"]) for each in of_task if each["ranked"]]
            mean = sum(n * gauc for n, gauc in ranked) / sum(n for n, _ in ranked)
            assert mean == pytest.approx(task.gauc_windowed, abs=1e-12)


def test_a_backtest_counts_the_same_labels_whenever_tasks_are_trained_on(
    capsys: Captured, tmp_path: Path, world: Path
) -> None:
    waits, waits_baseline = backtest(tmp_path, world, "{default: window}")
    at_once, at_once_baseline = backtest(tmp_path, world, "{default: immediate, click: 2}")

    assert conservation_errors(at_once) == conservation_errors(waits) == []
    assert at_once["events"] == waits["events"]
    assert at_once["feedback"]["corrected"] > 0
    assert waits["feedback"]["corrected"] == 0
    positives = {name: task["positives"] for name, task in waits["tasks"].items()}
    assert {name: task["positives"] for name, task in at_once["tasks"].items()} == positives
    assert waits_baseline == at_once_baseline == positives
    capsys.readouterr()
    assert run(["curves", str(tmp_path / "history"), "--last", "1", "--task", "click"]) == 0
    title, _, row = capsys.readouterr().out.strip().splitlines()
    assert title.strip() == "click"
    assert f"  {at_once['version']:,}  " in row
    assert run(["curves", str(tmp_path / "history"), "--task", "clicks"]) == 2
    assert "--task clicks: no such task, expected one of click, " in capsys.readouterr().err


@pytest.mark.parametrize("wait", ["{default: window}", "{default: immediate, click: 2}"])
def test_figures_are_the_same_whether_or_not_scores_are_computed_beside_the_training(
    tmp_path: Path, world: Path, wait: str
) -> None:
    config = load_config(write_config(tmp_path, "redis://unused:1/0", "unused"), {"SMES_STREAM__JOIN__WAIT": wait})

    beside, waiting = (
        run_backtest(config, world, limit=None, seed=0, baseline=None, should_stop=lambda: False, evaluate=evaluate)
        for evaluate in (None, build_evaluation)
    )

    assert beside.report.tasks == waiting.report.tasks
    assert any(task.gauc_windowed is not None for task in beside.report.tasks.values())


def test_a_log_that_breaks_off_stops_the_backtest_with_its_error(
    tmp_path: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(write_config(tmp_path, "redis://unused:1/0", "unused"), {})
    read: list[int] = []

    def broken(reader: LogReader, seed: int) -> Iterator[tuple[ImpressionBlock, FeedbackBlock]]:
        for pair in replay_blocks(reader, seed, rows_per_block=512):
            if len(read) == 3:
                raise LogError("the disk is gone")
            read.append(len(pair[0]))
            yield pair

    monkeypatch.setattr("smes_cli.backtest.replay_blocks", broken)
    with pytest.raises(LogError, match="the disk is gone"):
        run_backtest(config, world, limit=None, seed=0, baseline=None, should_stop=lambda: False)
    assert read == [512] * 3
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith(("smes-read", "smes-frozen"))]


def test_a_wait_of_a_task_that_does_not_exist_is_named(
    capsys: Captured, tmp_path: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMES_STREAM__JOIN__WAIT", "{clicks: immediate}")
    path = write_config(tmp_path, "redis://unused:1/0", "unused")

    assert run(["-c", str(path), "backtest", str(world)]) == 2
    assert "stream.join.wait: unknown tasks ['clicks'], expected 'default' or names among" in capsys.readouterr().err
