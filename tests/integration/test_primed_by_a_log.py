"""A backtest's checkpoint, and a live training from it, on real servers: bit for bit one uninterrupted training.

Guarantees shown: the events that both logs hold count once, the live audit balances, and a restart goes on from the
live training's own checkpoint.
"""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from simulators.synthetic import synthesize
from smes.errors import CheckpointError, ServingWithoutCheckpoint
from smes_cli.__main__ import EXIT_USAGE, run
from smes_cli.backtest import run_backtest
from smes_cli.config import Config
from smes_cli.primed_start import PrimedStart
from smes_cli.train import run_train
from smes_io.clock import wall_clock_ms
from stream.log.open_log import open_event_log
from stream.topics import IMPRESSIONS
from tests.integration.training import (
    Pairs,
    assert_same_weights,
    drain,
    fill_servers,
    newest_step,
    one_thread,
    read_pairs,
    snapshots_of,
    train_in_process,
)
from tests.running import read_config, until, write_config
from trainer.loop import Trainer
from trainer.report import conservation_errors
from trainer.run_report import training_report

PRIMED = 1600  # about 1,000 of them wait at its end: windows are 5 s, and 200 impressions are a second


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pairs, Trainer]:
    """A checkpoint of a backtest of the first impressions, all events, and a training on all that never stopped."""
    folder = tmp_path_factory.mktemp("offline")
    config = read_config(write_config(folder, "redis://127.0.0.1:1/0", "none"))
    world = folder / "world.parquet"
    synthesize(world, 2200, seed=5)
    pairs = read_pairs(config, world)
    with one_thread():
        run_backtest(
            config,
            world,
            limit=PRIMED,
            seed=config.replay.seed,
            baseline=None,
            should_stop=lambda: False,
            checkpoint=folder / "primed",
        )
        return folder / "primed", pairs, train_in_process(config, pairs, flush=True)


def drain_primed(config: Config, start: PrimedStart) -> dict[str, Any]:
    report = run_train(config, report=None, drain=True, skip_lost=False, should_stop=lambda: True, primed=start)
    assert report is not None
    return report.to_dict()


@pytest.mark.parametrize("kind", ["redis", pytest.param("kafka", marks=pytest.mark.kafka)])
def test_a_log_primes_the_live_loop_as_if_there_had_been_one_stream(
    kind: str,
    redis_url: str,
    namespace: str,
    offline: tuple[Path, Pairs, Trainer],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    kafka = request.getfixturevalue("kafka_bootstrap") if kind == "kafka" else None
    path = write_config(tmp_path, redis_url, namespace, kafka=kafka)
    config, (folder, pairs, expected) = read_config(path), offline
    fill_servers(config, pairs[:2], "json")  # 400 of the impressions that the log in files has, too
    since_ms = wall_clock_ms() + 1
    until(lambda: wall_clock_ms() > since_ms, "another millisecond")
    fill_servers(config, pairs[2:10], "arrow")
    first = drain_primed(config, PrimedStart(folder, since_ms))
    with snapshots_of(config) as store:
        (published, *_) = store.list()
    fill_servers(config, pairs[10:], "arrow")
    report = drain(config, flush=True)  # another life of the trainer

    assert 0 < newest_step(folder) < newest_step(tmp_path / "checkpoints")
    assert_same_weights(tmp_path / "checkpoints", expected)
    assert report["tasks"] == training_report(expected, seconds=1, trained=1).to_dict()["tasks"]
    every, at_once = sum(len(block) for block, _ in pairs), sum(len(block) for block, _ in pairs[:2])
    assert (report["events"]["trained"], report["events"]["waiting"]) == (every, 0)
    events = report["events"]
    assert events["impressions"] == PRIMED + every - at_once
    assert events["late"] + events["duplicate"] == PRIMED - at_once
    assert conservation_errors(report) == []
    assert run(["-c", str(path), "audit"]) == 0
    assert published.kind == "full"
    assert first["lineage"] == report["lineage"] == published.lineage


def test_what_cannot_be_primed_is_refused_and_says_why(
    redis_url: str,
    namespace: str,
    world: Path,
    offline: tuple[Path, Pairs, Trainer],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_config(tmp_path, redis_url, namespace)
    config, (folder, *_) = read_config(path), offline
    with closing(open_event_log(config.event_log)) as log:
        log.ensure_topic(IMPRESSIONS, 2)
    other = read_config(write_config(tmp_path / "other", redis_url, namespace, trainer={"checkpoint": {"keep": 1}}))
    with pytest.raises(CheckpointError, match="smes train --from goes on from"):
        drain(
            read_config(
                write_config(
                    tmp_path / "third", redis_url, namespace, trainer={"checkpoint": {"directory": str(folder)}}
                )
            )
        )
    drain_primed(config, PrimedStart(folder))
    with pytest.raises(ValueError, match="has a checkpoint already, expected none"):
        drain_primed(config, PrimedStart(folder))
    with pytest.raises(ServingWithoutCheckpoint, match="expected --anew beside it"):
        drain_primed(other, PrimedStart(folder))
    for wrong, expected in ((tmp_path / "none", "no such folder"), (tmp_path / "checkpoints", "of a live trainer")):
        assert run(["-c", str(tmp_path / "other" / "smes.yaml"), "train", "--anew", "--from", str(wrong)]) == 1
        assert expected in capsys.readouterr().err
    assert run(["-c", str(path), "train", "--since", "2h"]) == EXIT_USAGE
    ahead = PrimedStart(folder, wall_clock_ms() + 60_000)
    with pytest.raises(ValueError, match="expected a time that is over"):
        drain_primed(other, ahead)
    assert run(["-c", str(path), "backtest", str(world), "--checkpoint", str(folder)]) == EXIT_USAGE
    assert "has a checkpoint already, expected an empty folder" in capsys.readouterr().err
