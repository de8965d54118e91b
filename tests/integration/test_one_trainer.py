"""One trainer at a time: two processes of ``smes train`` on one folder of checkpoints, or on one namespace.

Guarantee shown: the second one stops and says who holds it. What a killed trainer leaves behind holds up nobody. A
trainer that lost its lease stops and publishes nothing more.
"""

import json
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from feature_store.snapshots import SnapshotStore
from smes_cli.config import Config
from tests.integration.training import fill_servers, newest_step, read_pairs, snapshots_of
from tests.running import DEADLINE_S, read_config, start_smes, until, until_log_says, write_config
from trainer.checkpoints import LOCK

_WAITING = "training: waiting for events"


@pytest.fixture
def path(redis_url: str, namespace: str, world: Path, tmp_path: Path) -> Path:
    """A configuration with a short lease, and a log with something to train on."""
    path = write_config(tmp_path / "one", redis_url, namespace, trainer={"lease_s": 2.0})
    config = read_config(path)
    fill_servers(config, read_pairs(config, world), "arrow")
    return path


@pytest.fixture
def other_folder(redis_url: str, namespace: str, tmp_path: Path) -> Path:
    """The same namespace, with another folder of checkpoints."""
    return write_config(tmp_path / "two", redis_url, namespace, trainer={"lease_s": 2.0})


@pytest.fixture
def first(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A trainer that runs."""
    process = start_training(path, "first.log")
    until(lambda: newest_step(path.parent / "checkpoints") > 0, "a first step")
    yield process
    process.kill()
    process.wait(DEADLINE_S)


def start_training(path: Path, log: str) -> subprocess.Popen[bytes]:
    process = start_smes(path.parent / log, "-c", str(path), "train")
    until_log_says(path.parent / log, _WAITING, process)
    return process


def output_of_a_refused_one(path: Path) -> str:
    """What a trainer prints that cannot start."""
    log = path.parent / "second.log"
    process = start_smes(log, "-c", str(path), "train")
    assert process.wait(DEADLINE_S) == 1, log.read_text()
    return log.read_text()


def test_a_second_trainer_on_the_same_folder_stops_and_says_who_holds_it(
    first: subprocess.Popen[bytes], path: Path
) -> None:
    output = output_of_a_refused_one(path)

    holder = rf"checkpoint folder .*checkpoints: held by process {first.pid} on {re.escape(socket.gethostname())} since"
    assert re.search(rf"{holder} 20\d\d-", output), output
    assert first.poll() is None


def test_a_second_trainer_on_the_same_namespace_stops_and_says_who_holds_it(
    first: subprocess.Popen[bytes], other_folder: Path
) -> None:
    output = output_of_a_refused_one(other_folder)

    assert re.search(rf"held by process {first.pid} on {re.escape(socket.gethostname())} since 20\d\d-", output), output
    assert first.poll() is None
    assert newest_step(other_folder.parent / "checkpoints") == -1


def test_what_a_killed_trainer_leaves_behind_holds_up_nobody(first: subprocess.Popen[bytes], path: Path) -> None:
    first.kill()
    first.wait(DEADLINE_S)
    checkpoints = path.parent / "checkpoints"
    (checkpoints / "step-000000000099-00000099.partial").write_bytes(b"half")
    assert json.loads((checkpoints / LOCK).read_text())["pid"] == first.pid

    second = start_training(path, "second.log")

    assert json.loads((checkpoints / LOCK).read_text())["pid"] == second.pid
    assert list(checkpoints.glob("*.partial")) == []
    second.terminate()
    assert second.wait(DEADLINE_S) == 0


def test_a_stopped_trainer_gives_the_namespace_back_at_once(
    first: subprocess.Popen[bytes], path: Path, other_folder: Path
) -> None:
    config = read_config(path)
    first.terminate()
    assert first.wait(DEADLINE_S) == 0

    with snapshots_of(config) as store:
        store.acquire("the next one", 60).release()


def take_over(config: Config, store: SnapshotStore) -> None:
    """Take the lease as a trainer could that another one lost: it expired."""
    from smes_io.redis_client import connect

    with connect(config.feature_store.redis_url, 20.0) as client:
        client.delete(f"{{{config.feature_store.namespace}}}:snapshots:lease")
    store.acquire("somebody else", 3600)


def test_a_trainer_that_lost_its_lease_stops_and_says_who_took_it(first: subprocess.Popen[bytes], path: Path) -> None:
    config = read_config(path)
    with snapshots_of(config) as store:
        take_over(config, store)
        before = [(m.lineage, m.version) for m in store.list()]
        assert first.wait(DEADLINE_S) == 1
        after = [(m.lineage, m.version) for m in store.list()]

    output = (path.parent / "first.log").read_text()
    assert re.search("smes: .*held by somebody else since 20", output), output
    assert after == before
    assert newest_step(path.parent / "checkpoints") > 0
