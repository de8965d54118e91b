"""What ``smes train`` does at the end of a finite log, and what it prints."""

from pathlib import Path

import pytest

from smes_cli.config import Config
from smes_cli.train_progress import TrainProgress
from tests.integration.training import drain, fill_servers, read_pairs, totals
from tests.running import read_config, write_config
from tests.trainer.small_world import fill, make_trainer, open_log, train_to_the_end
from trainer.report import conservation_errors


@pytest.fixture
def config(redis_url: str, namespace: str, world: Path, tmp_path: Path) -> Config:
    """A configuration whose log holds the world."""
    config = read_config(write_config(tmp_path, redis_url, namespace))
    fill_servers(config, read_pairs(config, world), "arrow")
    return config


def test_a_drain_says_what_is_left_waiting_and_how_to_train_on_it(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    report = drain(config)

    waiting = report["events"]["waiting"]
    assert waiting > 0
    assert f"{waiting:,} impressions are left waiting for feedback" in capsys.readouterr().out
    assert report["events"]["trained"] + waiting == report["events"]["impressions"]


def test_a_flush_trains_on_everything(config: Config, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    impressions, _ = totals(read_pairs(config, world))

    report = drain(config, flush=True)

    assert conservation_errors(report) == []
    assert (report["events"]["trained"], report["events"]["waiting"]) == (impressions, 0)
    assert "left waiting" not in capsys.readouterr().out


def test_after_a_flush_the_next_run_has_nothing_to_do(config: Config) -> None:
    first = drain(config, flush=True)

    again = drain(config, flush=True)

    assert (again["version"], again["events"]) == (first["version"], first["events"])


def test_the_rate_is_that_since_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    now_s = [1000.0]
    log = open_log()
    fill(log, 1500)
    trainer = make_trainer(log, None)
    progress = TrainProgress(trainer, None, monotonic=lambda: now_s[0])
    train_to_the_end(trainer)

    now_s[0] += 5.0
    progress.after_read()
    now_s[0] += 3600.0  # an hour without events
    progress.after_read()

    busy, idle = capsys.readouterr().out.splitlines()
    assert f"({trainer.trained / 5:,.0f}/s)" in busy
    assert "(0/s)" in idle
