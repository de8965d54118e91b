"""``smes train --workers`` on a real event log: a rank that is killed costs nothing, and nothing stays behind."""

import hashlib
import os
import signal
from pathlib import Path

import psutil
import pytest
from safetensors import safe_open

from smes.world import World
from smes_cli.__main__ import run
from smes_cli.config import Config
from smes_cli.demo.processes import log_tail
from smes_cli.train import run_train
from tests.integration.training import fill_servers, read_pairs, snapshots_of, totals
from tests.running import (
    MARKER,
    environment,
    read_config,
    read_json,
    running,
    start_smes,
    until,
    until_log_says,
    write_config,
)
from tests.worlds import on_ranks
from trainer.report import conservation_errors


def ranks_drain(config: Config, report: Path) -> None:
    """Drain the log by two ranks in threads of this process."""

    def work(world: World) -> None:
        run_train(
            config,
            report=report if world.rank == 0 else None,
            drain=True,
            skip_lost=False,
            should_stop=lambda: True,
            world=world,
        )

    on_ranks(2, work)


def newest_parts(folder: Path) -> dict[str, str]:
    """Digest of every array of the newest checkpoint of several ranks, by rank and name."""
    manifest = max(folder.glob("*.ranks.json"))
    digests = {}
    for rank, part in enumerate(read_json(manifest)["parts"]):
        with safe_open(folder / part["name"], framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - no dict
                digests[f"{rank}/{name}"] = hashlib.sha256(file.get_tensor(name).tobytes()).hexdigest()
    return digests


@pytest.mark.timeout(300)  # four processes start; alone it takes a tenth of that
def test_a_killed_rank_costs_no_bit_and_nothing_stays_behind(
    redis_url: str, namespace: str, world: Path, tmp_path: Path
) -> None:
    """The ranks that are killed are processes; those that are not, to compare with, are threads of this one."""
    log = {"partitions": 4, "namespace": namespace}
    paths = [
        write_config(
            tmp_path / name, redis_url, namespace, event_log=log, feature_store={"namespace": namespace + name}
        )
        for name in ("killed", "whole")
    ]
    killed, whole = map(read_config, paths)
    pairs = read_pairs(killed, world)
    fill_servers(killed, pairs, "arrow")
    ranks_drain(whole, tmp_path / "whole.json")
    expected = read_json(tmp_path / "whole.json")
    assert (expected["events"]["impressions"], expected["feedback"]["received"]) == totals(pairs)
    assert conservation_errors(expected) == []
    assert expected["ranks"] == 2

    output, report = tmp_path / "ranks.log", tmp_path / "killed.json"
    env = environment() | {MARKER: namespace}
    options = ["train", "--drain", "--workers", "2", "--report", str(report)]
    trainer = start_smes(output, "-c", str(paths[0]), *options, env=env)
    until(lambda: list((tmp_path / "killed" / "checkpoints").glob("*.ranks.json")), "a checkpoint")
    first, second = psutil.Process(trainer.pid).children()
    os.kill(second.pid, signal.SIGKILL)
    until_log_says(output, "going on from the checkpoint", trainer)
    trainer.send_signal(signal.SIGTERM)
    assert trainer.wait(120) == 0, log_tail(output, 60)

    got = read_json(report)
    for section in ("version", "events", "feedback", "tasks", "rows", "active_experts"):
        assert got[section] == expected[section], section
    assert newest_parts(tmp_path / "killed" / "checkpoints") == newest_parts(tmp_path / "whole" / "checkpoints")
    with snapshots_of(killed) as store:
        current = store.current()
    assert current is not None
    assert current.step == got["version"]
    assert sum(current.positions["impressions"].values()) > 0
    assert len(current.positions["impressions"]) == 4
    assert not first.is_running()
    assert running(namespace, tmp_path) == []


def test_what_ranks_cannot_do_is_said_before_they_start(
    redis_url: str, namespace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, redis_url, namespace, trainer={"gate": {"enabled": True}})

    assert run(["-c", str(path), "train", "--workers", "2"]) == 2

    assert "trainer.gate.enabled: true, expected false with 2 ranks" in capsys.readouterr().err
