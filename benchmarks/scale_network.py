"""Ranks with addresses of their own, between which the network is slow, loses packets, and breaks for a while.

Each rank runs in a network namespace, joined by wires to the other and to a Valkey. A wire is a pair of TUN devices
with a thread between them, which delays and drops packets: ``tc netem`` does so, too, but a kernel may lack it. Root's
rights are needed; without them the part says so and measures nothing.
"""

import fcntl
import heapq
import itertools
import math
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.chaos_system import WAITING, ChaosError, environment, read_config, read_json
from benchmarks.scale_ranks import fill, rank_digests, rank_processes
from feature_store.folding import read_weights
from feature_store.snapshots import SnapshotStore
from smes.errors import SmesError
from smes_cli.compile_loops import compile_loops
from smes_cli.demo.local_servers import valkey_program
from smes_cli.demo.processes import log_tail, spawn, stop
from smes_io.clock import wait_until
from smes_io.redis_client import connect

RANKS = 2
_NET, _BETWEEN, _MTU = "10.77.63", "10.77.64", 9000
_TUN, _TUNSETIFF, _IFF_TUN, _IFF_NO_PI = "/dev/net/tun", 0x400454CA, 0x0001, 0x1000
_PORT, _RENDEZVOUS = 6399, 29400
_WITHIN_S = 600.0


def why_not() -> str | None:
    """Why no namespaces and wires can be made here; None if they can."""
    if os.geteuid() != 0:
        return "not root"
    if not (shutil.which("ip") and Path(_TUN).exists()):
        return f"no ip (iproute2), or no {_TUN}"
    name = f"smes-try-{os.getpid()}"
    try:
        _ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        return str(error.stderr).strip()
    _ip("netns", "del", name)
    return None


@dataclass
class Faults:
    """What happens to every packet, from now on.

    Attributes:
        delay_s: How long it is on its way.
        loss: Share that gets lost; 1 is a wire that is cut.
    """

    delay_s: float = 0.0
    loss: float = 0.0


class Wire(threading.Thread):
    """Carries packets between two TUN devices, which it makes.

    Args:
        names: Of the devices; they can be moved into namespaces while it runs.
        faults: Looked at for each packet.
        seed: Of what gets lost.
    """

    def __init__(self, names: tuple[str, str], faults: Faults, seed: int) -> None:
        super().__init__(name=f"wire-{names[0]}", daemon=True)
        self._ends = [_open_tun(name) for name in names]
        self._faults, self._random = faults, random.Random(seed)  # noqa: S311 - which packets get lost
        self._over = threading.Event()

    def run(self) -> None:
        poller, other = select.poll(), dict(zip(self._ends, reversed(self._ends), strict=True))
        for end in self._ends:
            poller.register(end, select.POLLIN)
        on_their_way: list[tuple[float, int, int, bytes]] = []
        for number in itertools.count():
            now_s = time.monotonic()
            while on_their_way and on_their_way[0][0] <= now_s:
                _, _, end, packet = heapq.heappop(on_their_way)
                with suppress(OSError):  # its device is down
                    os.write(end, packet)
            if self._over.is_set():
                return
            wait_s = min(0.05, on_their_way[0][0] - now_s) if on_their_way else 0.05
            for end, _ in poller.poll(max(0, math.ceil(1000 * wait_s))):
                with suppress(OSError):
                    packet = os.read(end, _MTU + 100)
                    if self._random.random() >= self._faults.loss:
                        due_s = time.monotonic() + self._faults.delay_s
                        heapq.heappush(on_their_way, (due_s, 2 * number + (end == self._ends[0]), other[end], packet))

    def close(self) -> None:
        """End; the devices are gone then."""
        self._over.set()
        self.join(5)
        for end in self._ends:
            os.close(end)


def _open_tun(name: str) -> int:
    end = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return end


@dataclass
class Network:
    """A namespace for each of two ranks, a wire between them, and one from each to this machine.

    Attributes:
        stack: Removes them at its end.
        faults: Of all wires.
        names: Of the namespaces.
    """

    stack: ExitStack
    faults: Faults = field(default_factory=Faults)
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        prefix = f"smes{os.getpid() % 100_000}"
        for rank in range(RANKS):
            name = f"{prefix}-r{rank}"
            _ip("netns", "add", name)
            self.stack.callback(_ip, "netns", "del", name)
            _ip("-n", name, "link", "set", "lo", "up")
            self.names.append(name)
            host, own = f"{_NET}.{4 * rank + 1}", f"{_NET}.{4 * rank + 2}"
            self._join((f"{prefix}h{rank}", None, host), (f"{prefix}s{rank}", name, own))
            if rank:
                _ip("-n", name, "route", "add", f"{_NET}.1/32", "via", host)
        ends = [(f"ranks{rank}", name, self.address(rank)) for rank, name in enumerate(self.names)]
        self._join(ends[0], ends[1])

    def _join(self, one: tuple[str, str | None, str], other: tuple[str, str | None, str]) -> None:
        """Join two (device, namespace, address) by a wire."""
        wire = Wire((one[0], other[0]), self.faults, seed=len(self.names))
        wire.start()
        self.stack.callback(wire.close)
        for (device, namespace, address), (_, _, peer) in ((one, other), (other, one)):
            inside = ("-n", namespace) if namespace else ()
            if namespace:
                _ip("link", "set", device, "netns", namespace)
            _ip(*inside, "addr", "add", address, "peer", peer, "dev", device)
            _ip(*inside, "link", "set", device, "mtu", str(_MTU), "up")

    def address(self, rank: int) -> str:
        return f"{_BETWEEN}.{1 + rank}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)  # noqa: S607 - iproute2, wherever


@contextmanager
def _valkey(folder: Path) -> Iterator[str]:
    """A Valkey that both ranks reach; its URL."""
    folder.mkdir(parents=True, exist_ok=True)
    argv = [
        valkey_program(),
        "--bind",
        f"{_NET}.1",
        "--port",
        str(_PORT),
        "--dir",
        str(folder),
        "--protected-mode",
        "no",
    ]
    process = spawn([*argv, "--save", "", "--appendonly", "no"], log=folder / "valkey.log", cwd=folder)
    url = f"redis://{_NET}.1:{_PORT}/0"
    try:
        connect(url, 20.0).close()
        yield url
    finally:
        stop(process, timeout_s=5)


def _config(folder: Path, name: str, url: str, log_namespace: str) -> Path:
    data: dict[str, Any] = {
        "schema": "synthetic",
        "event_log": {
            "redis_url": url,
            "namespace": log_namespace,
            "partitions": 4,
            "redis": {"outage_timeout_s": 120.0},
        },
        "feature_store": {"redis_url": url, "namespace": name},
        "stream": {"batch": {"size": 64, "max_wait_s": None}, "idle_after_s": 3600.0},
        "trainer": {
            "device": "cpu",
            "threads": 1,
            "snapshot_interval_s": 0.5,
            "checkpoint": {"directory": str(folder / f"checkpoints-{name}"), "interval_s": 2.0},
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def _train(network: Network, config: Path, stack: ExitStack) -> list[subprocess.Popen[bytes]]:
    """One torchrun in each namespace, as on so many hosts."""
    running = []
    for rank, name in enumerate(network.names):
        torchrun = [
            sys.executable,
            "-P",
            "-m",
            "torch.distributed.run",
            f"--nnodes={RANKS}",
            "--nproc-per-node=1",
        ]
        torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint={network.address(0)}:{_RENDEZVOUS}", "--rdzv-id=scale"]
        torchrun += [f"--local-addr={network.address(rank)}", f"--rdzv-conf=is_host={int(rank == 0)}"]
        torchrun += ["--max-restarts=100", "--module", "smes_cli"]
        smes = ["-c", str(config), "train", "--flush", "--report", str(config.with_suffix(".json"))]
        env = environment() | {"GLOO_SOCKET_IFNAME": f"ranks{rank}", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        log = config.with_name(f"{config.stem}-{rank}.log")
        process = spawn(["ip", "netns", "exec", name, *torchrun, *smes], log=log, env=env, cwd=config.parent)
        stack.callback(stop, process, timeout_s=0)
        running.append(process)
    return running


def _said(config: Path, text: str) -> bool:
    logs = [config.with_name(f"{config.stem}-{rank}.log") for rank in range(RANKS)]
    return any(log.exists() and text in log.read_text(errors="replace") for log in logs)


def _end(running: Sequence[subprocess.Popen[bytes]], config: Path) -> None:
    """Ask a rank to stop, which all hear: torchrun itself would give them 30 s, and end with an error."""
    (rank_0,) = (each for process in running for rank, each in rank_processes(process).items() if rank == 0)
    rank_0.terminate()
    for rank, process in enumerate(running):
        if process.wait(_WITHIN_S):
            log = config.with_name(f"{config.stem}-{rank}.log")
            raise ChaosError(f"rank {rank}: ended with status {process.returncode}:\n{log_tail(log, 30)}")


class _Reader(threading.Thread):
    """Loads the current version again and again, as a scorer does, and counts what is mixed or broken."""

    def __init__(self, url: str, namespace: str) -> None:
        super().__init__(daemon=True)
        self._url, self._namespace = url, namespace
        self._over = threading.Event()
        self.versions: list[tuple[float, int]] = []
        self.broken: list[str] = []

    def run(self) -> None:
        with closing(connect(self._url, 20.0)) as client:
            store = SnapshotStore(client, self._namespace)
            while not self._over.wait(0.2):
                manifest = store.current()
                if manifest is None or (self.versions and manifest.version == self.versions[-1][1]):
                    continue
                try:
                    read_weights(store, manifest)
                except SmesError as error:
                    current = store.current()
                    if current is not None and current.version == manifest.version:
                        self.broken.append(str(error))
                self.versions.append((time.monotonic(), manifest.version))

    def end(self) -> None:
        self._over.set()
        self.join(30)


def run_network(folder: Path, log: Path, limit: int) -> dict[str, Any]:
    """A calm run and a disturbed one over the same log: 20 ms of delay, then 2 % loss, then nothing for 10 s."""
    if why := why_not():
        return {"network_measured": False, "network_why_not": why}
    with ExitStack() as stack:
        network = Network(stack)
        url = stack.enter_context(_valkey(folder / "valkey"))
        calm, rough = (_config(folder, name, url, "network") for name in ("calm", "rough"))
        read = read_config(calm)
        compile_loops(read, read.schema_file().schema)
        fill(read, log, limit)
        began_s = time.monotonic()
        running = _train(network, calm, stack)
        if not wait_until(lambda: _said(calm, WAITING), timeout_s=300):
            raise ChaosError(f"calm: not begun:\n{log_tail(calm.with_name('calm-0.log'), 30)}")
        _end(running, calm)
        calm_s = time.monotonic() - began_s
        reader = _Reader(url, "rough")
        reader.start()
        began_s = time.monotonic()
        network.faults.delay_s = 0.02
        running = _train(network, rough, stack)
        if not wait_until(lambda: _said(rough, WAITING), timeout_s=300):
            raise ChaosError(f"rough: not begun:\n{log_tail(rough.with_name('rough-0.log'), 30)}")
        time.sleep(5)
        delayed = len(reader.versions)
        network.faults.loss = 0.02
        time.sleep(5)
        lossy = len(reader.versions)
        network.faults.loss = 1.0
        cut_s = time.monotonic()
        time.sleep(10)
        mended_s = time.monotonic()
        network.faults.delay_s = network.faults.loss = 0.0
        went_on = wait_until(lambda: any(at > mended_s for at, _ in reader.versions), timeout_s=120)
        stalled = sum(cut_s + 2 < at < mended_s for at, _ in reader.versions)
        first_after_s = min((at - mended_s for at, _ in reader.versions if at > mended_s), default=-1.0)
        _end(running, rough)
        rough_s = time.monotonic() - began_s
        reader.end()
        reports = [read_json(path.with_suffix(".json")) for path in (calm, rough)]
        return {
            "network_measured": True,
            "versions_while_delayed": delayed,
            "versions_while_lossy": lossy - delayed,
            "versions_while_cut": stalled,
            "went_on_after_the_cut": went_on,
            "first_version_after_s": first_after_s,
            "mixed_cuts": len(reader.broken),
            "mixed_examples": reader.broken[:3],
            "versions_read": len(reader.versions),
            "ledger_equal": all(reports[0][name] == reports[1][name] for name in ("events", "feedback")),
            "digests_equal": rank_digests(calm) == rank_digests(rough) != [],
            "calm_s": calm_s,
            "rough_s": rough_s,
        }
