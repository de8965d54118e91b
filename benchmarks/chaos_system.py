"""The system that chaos happens to: servers, trainer, scorers and a replay, each a real process.

The snapshots are in a Valkey of their own. So the event log can fail without them, and they without it, whichever event
log it is. Only the main thread may start processes (see :func:`smes_cli.demo.processes.spawn`).
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
import yaml
from safetensors import safe_open

from simulators.logs.reader import open_log
from simulators.merge import replay_blocks
from smes_cli.config import Config, load_config
from smes_cli.demo.local_servers import KafkaServer, ValkeyServer, free_ports, start_kafka, start_valkey
from smes_cli.demo.processes import log_tail, spawn, stop
from smes_io.clock import wait_until

EventLogKind = Literal["redis", "kafka"]
WAITING = "training: waiting for events"
PARTITIONS = 4
_READY_WITHIN_S, _ENDS_WITHIN_S = 120.0, 600.0


class ChaosError(RuntimeError):
    """A process did not do what no fault explains."""


@dataclass
class Server:
    """A server that can be killed and started again on its data and its port."""

    kind: EventLogKind
    folder: Path
    kafka_home: Path | None
    running: ValkeyServer | KafkaServer | None = None
    port: int | None = None

    def start(self) -> None:
        if self.kind == "kafka":
            assert self.kafka_home is not None
            self.running = start_kafka(self.kafka_home, self.folder, port=self.port)
        else:
            self.running = start_valkey(self.folder, port=self.port)
        self.port = self.running.port

    def kill(self) -> None:
        """SIGKILL, and nobody is left to answer."""
        assert self.running is not None
        self.running.process.kill()
        self.running.process.wait()

    def stop(self) -> None:
        if self.running is not None:
            self.running.stop()

    @property
    def pid(self) -> int:
        assert self.running is not None
        return self.running.pid

    @property
    def address(self) -> str:
        """``host:port``."""
        return f"127.0.0.1:{self.port}"


@dataclass
class System:
    """Servers and processes of one run, in one folder.

    Attributes:
        event_log: Kind of the event log.
        folder: Of everything.
        stack: Ends everything when it is closed.
        kafka_home: A Kafka distribution, for ``kafka``.
        launcher: How ``smes`` is started.
    """

    event_log: EventLogKind
    folder: Path
    stack: ExitStack
    kafka_home: Path | None = None
    launcher: Sequence[str] = ("-m", "smes_cli")

    def __post_init__(self) -> None:
        self.broker = Server(self.event_log, self.folder / "broker", self.kafka_home)
        self.store = Server("redis", self.folder / "store", None)
        for server in (self.broker, self.store):
            server.start()
            self.stack.callback(server.stop)

    def write_config(self, name: str, *, log_namespace: str | None = None, **sections: Any) -> Path:
        """Write a configuration whose result depends on the log alone; ``sections`` change it key by key.

        Args:
            name: Of the file, of the namespace and of the folder of checkpoints.
            log_namespace: Of the event log, if it is another one's.
            sections: Section → its changes.
        """
        redis = f"redis://{self.store.address}/0"
        kafka = self.event_log == "kafka"
        data: dict[str, Any] = {
            "schema": "synthetic",
            "event_log": {
                "kind": self.event_log,
                "redis_url": redis if kafka else f"redis://{self.broker.address}/0",
                "kafka_bootstrap": self.broker.address if kafka else "127.0.0.1:9092",
                "namespace": log_namespace or name,
                "partitions": PARTITIONS,
                "redis": {"outage_timeout_s": 600.0},
                "kafka": {"outage_timeout_s": 600.0},
            },
            "feature_store": {"redis_url": redis, "namespace": name},
            # No partition counts as idle, and no batch ends by the clock.
            "stream": {"batch": {"size": 64, "max_wait_s": None}, "idle_after_s": 3600.0},
            "trainer": {
                "device": "cpu",
                "threads": 1,
                "snapshot_interval_s": 0.5,
                "checkpoint": {"directory": str(self.folder / f"checkpoints-{name}"), "interval_s": 0.5},
            },
            "scorer": {"port": 0},
        }
        merge(data, sections)
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        return path

    def log_of(self, name: str) -> Path:
        """The file with what a process wrote; one that is started again goes on in it."""
        return self.folder / f"{name}.log"

    def start(self, name: str, config: Path, *arguments: str) -> subprocess.Popen[bytes]:
        """Start ``smes ARGUMENTS``; it is killed at the end, if it has not ended."""
        return self._start(name, self.launcher, [str(config), *arguments])

    def start_plain(self, name: str, config: Path, *arguments: str) -> subprocess.Popen[bytes]:
        """:meth:`start` without what faults need."""
        return self._start(name, ("-m", "smes_cli"), [str(config), *arguments])

    def _start(self, name: str, launcher: Sequence[str], arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-P", *launcher, "-c", *arguments]
        process = spawn(argv, log=self.log_of(name), env=environment(), cwd=self.folder)
        self.stack.callback(stop, process, timeout_s=0)
        return process

    def await_said(self, name: str, text: str, process: subprocess.Popen[bytes], *, after: int = 0) -> None:
        """Wait until a process wrote something behind this place of its file.

        Raises:
            ChaosError: It ended, or did not write it in time.
        """

        def said() -> bool:
            self.check_alive(name, process)
            return text in self.log_of(name).read_text(errors="replace")[after:]

        if not wait_until(said, timeout_s=_READY_WITHIN_S, pauses_s=(0.02,)):
            raise ChaosError(f"{name}: did not write {text!r} in {_READY_WITHIN_S:g} s:\n{self.tail(name)}")

    def await_ready(self, urls: Sequence[str], processes: Mapping[str, subprocess.Popen[bytes]]) -> None:
        """Wait until all scorers serve a snapshot.

        Raises:
            ChaosError: One of the processes ended, or it took too long.
        """

        def ready() -> bool:
            for name, process in processes.items():
                self.check_alive(name, process)
            return all(is_ready(url) for url in urls)

        if not wait_until(ready, timeout_s=_READY_WITHIN_S):
            raise ChaosError(f"no snapshot in service in {_READY_WITHIN_S:g} s:\n{self.tail('train')}")

    def check_alive(self, name: str, process: subprocess.Popen[bytes]) -> None:
        if process.poll() is not None:
            raise ChaosError(f"{name}: ended with status {process.returncode}:\n{self.tail(name)}")

    def finish(self, name: str, process: subprocess.Popen[bytes], *, terminate: bool) -> None:
        """Wait for the end of a process, which must succeed.

        Raises:
            ChaosError: It failed or did not end in time.
        """
        if terminate:
            self.check_alive(name, process)
            process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(_ENDS_WITHIN_S)
        except subprocess.TimeoutExpired as error:
            raise ChaosError(f"{name}: did not end in {_ENDS_WITHIN_S:g} s:\n{self.tail(name)}") from error
        if status:
            raise ChaosError(f"{name}: ended with status {status}:\n{self.tail(name)}")

    def train_to_the_end(self, name: str, config: Path) -> dict[str, Any]:
        """Train on everything that is in the log and was not trained on, in a process; its report."""
        report = self.folder / f"{name}.json"
        begins = self.written(name)
        process = self.start_plain(name, config, "train", "--flush", "--report", str(report))
        self.await_said(name, WAITING, process, after=begins)
        self.finish(name, process, terminate=True)
        return read_json(report)

    def written(self, name: str) -> int:
        """Characters that a process has written."""
        log = self.log_of(name)
        return len(log.read_text(errors="replace")) if log.exists() else 0

    def audit(self, config: Path) -> dict[str, Any]:
        """What ``smes audit --json`` says of the event log and the newest checkpoint."""
        argv = [sys.executable, "-P", "-m", "smes_cli", "-c", str(config), "audit", "--json"]
        done = subprocess.run(argv, env=environment(), cwd=self.folder, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 3):
            raise ChaosError(f"smes audit: status {done.returncode}:\n{done.stderr[-2000:]}")
        result = json.loads(done.stdout)
        assert isinstance(result, dict)
        return result

    def tail(self, name: str) -> str:
        return log_tail(self.log_of(name), 30)


def environment() -> dict[str, str]:
    """That of this process, without the variables that change a configuration."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SMES_")}
    return {**kept, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def read_config(path: Path) -> Config:
    """Without the variables of the environment."""
    return load_config(path, {})


def merge(data: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Change nested values key by key."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(data.get(key), dict):
            merge(data[key], value)
        else:
            data[key] = value


def is_ready(url: str) -> bool:
    """Whether a scorer serves a snapshot."""
    try:
        return httpx.get(f"{url}/health/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def scorer_urls(count: int) -> dict[str, str]:
    """Name → base URL on a free port."""
    return {f"serve-{i}": f"http://127.0.0.1:{port}" for i, port in enumerate(free_ports(count))}


def count_events(config: Path, log: Path, limit: int) -> int:
    """Impressions and feedback that a replay of so many impressions appends."""
    read = read_config(config)
    with open_log(log, read.schema_file(log), limit=limit) as reader:
        return sum(len(shown) + len(feedback) for shown, feedback in replay_blocks(reader, read.replay.seed))


def newest_checkpoint(config: Path) -> Path | None:
    """The checkpoint with the highest sequence number."""
    folder = read_config(config).trainer.checkpoint.directory
    assert folder is not None
    return max(folder.glob("step-*.safetensors"), key=lambda path: path.stem.rpartition("-")[2], default=None)


def newest_step(config: Path) -> int:
    """Step of the newest checkpoint, -1 without one."""
    newest = newest_checkpoint(config)
    return -1 if newest is None else int(newest.stem.split("-")[1])


def checkpoint_digest(config: Path, prefix: str = "") -> str:
    """SHA-256 over the newest checkpoint's arrays with this prefix: names, types, shapes and bytes.

    Without a prefix: weights, optimiser state, id table, positions, ledgers, join, evaluation and experts.

    Raises:
        ChaosError: There is no checkpoint.
    """
    newest = newest_checkpoint(config)
    if newest is None:
        raise ChaosError(f"{config}: no checkpoint at the end")
    sha = hashlib.sha256()
    with safe_open(newest, framework="np") as file:
        for name in sorted(file.keys()):
            if name.startswith(prefix):
                array = file.get_tensor(name)
                sha.update(f"{name} {array.dtype.str} {list(array.shape)} ".encode())
                sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text())
    assert isinstance(value, dict)
    return value
