"""A trainer as a process, and servers that are killed or hang under it: real ones, started by the test.

Guarantee shown: checkpoints go on while the event log is away. A stop is heard then, and checkpoint and report are
written at once. The exit code says whether the last snapshot was published.
"""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from smes_cli.config import Config
from smes_cli.demo.local_servers import KafkaServer, ValkeyServer, start_kafka, start_valkey
from tests.integration.training import (
    Pairs,
    assert_same_counts,
    assert_same_weights,
    fill_servers,
    newest_checkpoint,
    newest_step,
    read_pairs,
    train_in_process,
)
from tests.running import DEADLINE_S, read_config, read_json, start_smes, until, until_log_says, write_config
from trainer.report import conservation_errors

_WAITING = "training: waiting for events"
_HANGS = 600.0  # longer than any test: what waits for this hangs
_HEARD_S = 30.0  # a bound against hanging; by itself a stop takes one to three seconds


@dataclass(frozen=True)
class Setting:
    """A trainer's configuration on an event log of its own, and the server to fail."""

    config: Config
    path: Path
    server: ValkeyServer | KafkaServer
    store_is_the_log: bool


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def setting_on(server: ValkeyServer | KafkaServer, redis_url: str, namespace: str, folder: Path) -> Setting:
    """The event log may be away for long before that is an error; the last snapshot is cut by the stop alone."""
    kafka = server.bootstrap if isinstance(server, KafkaServer) else None
    kind = "redis" if kafka is None else "kafka"
    sections: dict[str, Any] = {
        "trainer": {"snapshot_interval_s": _HANGS},
        "event_log": {kind: {"outage_timeout_s": _HANGS}},
        "feature_store": {"timeout_s": _HANGS},
    }
    url = server.url if isinstance(server, ValkeyServer) else redis_url
    path = write_config(folder, url, namespace, kafka=kafka, **sections)
    return Setting(read_config(path), path, server, store_is_the_log=kafka is None)


@pytest.fixture(params=["redis", pytest.param("kafka", marks=pytest.mark.kafka)])
def setting(
    request: pytest.FixtureRequest, stack: ExitStack, redis_url: str, namespace: str, tmp_path: Path
) -> Setting:
    """On a server that may be killed."""
    if request.param == "redis":
        server: ValkeyServer | KafkaServer = stack.enter_context(start_valkey(tmp_path / "valkey"))
    else:
        server = stack.enter_context(start_kafka(request.getfixturevalue("kafka_home"), tmp_path / "kafka"))
    return setting_on(server, redis_url, namespace, tmp_path)


@pytest.fixture(params=["redis", pytest.param("kafka", marks=pytest.mark.kafka)])
def hanging(
    request: pytest.FixtureRequest, stack: ExitStack, redis_url: str, namespace: str, tmp_path: Path
) -> Setting:
    """On a server that may be held up, and goes on after the test."""
    if request.param == "redis":
        server: ValkeyServer | KafkaServer = stack.enter_context(start_valkey(tmp_path / "valkey"))
    else:
        server = request.getfixturevalue("kafka_server")
    stack.callback(os.kill, server.pid, signal.SIGCONT)
    return setting_on(server, redis_url, namespace, tmp_path)


def world_in(setting: Setting, world: Path) -> Pairs:
    """The world's events, of which the event log has the first half."""
    pairs = read_pairs(setting.config, world)
    fill_servers(setting.config, pairs[:8], "arrow")
    return pairs


def start_trainer(setting: Setting, *arguments: str) -> subprocess.Popen[bytes]:
    """A trainer that has taken a step."""
    log = setting.path.parent / "train.log"
    process = start_smes(log, "-c", str(setting.path), "train", "--report", "report.json", *arguments)
    until_log_says(log, _WAITING, process)
    until(lambda: newest_step(setting.path.parent / "checkpoints") > 0, "a first step")
    return process


def sequence(folder: Path) -> int:
    newest = newest_checkpoint(folder)
    return 0 if newest is None else int(newest.stem.rpartition("-")[2])


def assert_a_stop_is_heard_and_everything_saved(setting: Setting, fault: signal.Signals, folder: Path) -> None:
    process = start_trainer(setting)
    os.kill(setting.server.pid, fault)
    seen = sequence(folder / "checkpoints")
    until(lambda: sequence(folder / "checkpoints") >= seen + 15, "checkpoints after the fault")  # it waits by now

    process.terminate()
    status = process.wait(_HEARD_S)

    log = (folder / "train.log").read_text()
    # With Redis as event log, the snapshots are away, too. With Kafka the last one is published.
    assert status == (1 if setting.store_is_the_log else 0), log
    assert ("not published" in log) == setting.store_is_the_log
    assert "Traceback" not in log
    report = read_json(folder / "report.json")
    assert conservation_errors(report) == []
    assert report["version"] == newest_step(folder / "checkpoints") > 0


@pytest.mark.timeout(400)
def test_a_stop_while_the_event_log_is_dead_is_heard_and_everything_is_saved(
    setting: Setting, world: Path, tmp_path: Path
) -> None:
    world_in(setting, world)
    assert_a_stop_is_heard_and_everything_saved(setting, signal.SIGKILL, tmp_path)


@pytest.mark.timeout(400)
def test_a_stop_while_the_event_log_hangs_is_heard_and_what_was_saved_is_gone_on_from(
    hanging: Setting, world: Path, tmp_path: Path
) -> None:
    pairs = world_in(hanging, world)
    assert_a_stop_is_heard_and_everything_saved(hanging, signal.SIGSTOP, tmp_path)
    os.kill(hanging.server.pid, signal.SIGCONT)
    fill_servers(hanging.config, pairs[8:], "arrow")

    log = tmp_path / "again.log"
    again = start_smes(log, "-c", str(hanging.path), "train", "--drain", "--report", "report.json")
    until_log_says(log, _WAITING, again)
    again.terminate()
    assert again.wait(DEADLINE_S) == 0, log.read_text()

    expected = train_in_process(hanging.config, pairs)
    assert_same_counts(read_json(tmp_path / "report.json"), expected)
    assert_same_weights(tmp_path / "checkpoints", expected)


@pytest.mark.timeout(400)
def test_a_stop_with_drain_saves_at_once_and_drains_when_the_log_is_back(
    hanging: Setting, world: Path, tmp_path: Path
) -> None:
    pairs = world_in(hanging, world)
    fill_servers(hanging.config, pairs[8:], "arrow")
    process = start_trainer(hanging, "--drain")
    os.kill(hanging.server.pid, signal.SIGSTOP)

    process.terminate()
    until((tmp_path / "report.json").exists, "a report while the log is away", _HEARD_S)
    assert process.poll() is None
    os.kill(hanging.server.pid, signal.SIGCONT)
    assert process.wait(DEADLINE_S) == 0, (tmp_path / "train.log").read_text()

    expected = train_in_process(hanging.config, pairs)
    assert_same_counts(read_json(tmp_path / "report.json"), expected)
    assert_same_weights(tmp_path / "checkpoints", expected)


def each_life_goes_on(start: Callable[[Path], subprocess.Popen[bytes]], checkpoints: Path, folder: Path) -> list[int]:
    """Steps of the newest checkpoint at the ends of lives that are killed at their first own checkpoint."""
    steps = [0]
    for life in range(2):
        process = start(folder / f"life-{life}.log")
        until(lambda: newest_step(checkpoints) > steps[-1], "a checkpoint of this life")
        process.kill()
        process.wait(DEADLINE_S)
        steps.append(newest_step(checkpoints))
    return steps


@pytest.mark.timeout(300)
def test_a_trainer_that_dies_long_before_its_interval_is_over_advances(
    redis_url: str, namespace: str, world: Path, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {"trainer": {"checkpoint": {"interval_s": _HANGS, "first_interval_s": _HANGS}}}
    path = write_config(tmp_path, redis_url, namespace, stream={"batch": {"size": 8}}, **sections)
    config = read_config(path)
    fill_servers(config, read_pairs(config, world), "arrow")

    steps = each_life_goes_on(lambda log: start_smes(log, "-c", str(path), "train"), tmp_path / "checkpoints", tmp_path)

    assert steps == sorted(set(steps))
