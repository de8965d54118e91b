"""How soon a rollback is in effect in every scorer, while the trainer goes on publishing.

``smes snapshots rollback`` is run as a command. Its time is that of the record that it writes. From there to the first
answer of the old version, each of three scorers is asked without pause. Then all must stay with it for a while,
whatever is published; ``smes snapshots unpin`` ends the round.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from benchmarks.chaos_kills import Replayed, prepare, start_replay
from benchmarks.chaos_system import ChaosError, System, environment, read_config, scorer_urls
from feature_store.snapshots import SnapshotStore
from smes_io.clock import wait_until, wall_clock_ms
from smes_io.redis_client import connect

_SCORERS = 3
_PAUSE_S = 0.002
_STAYS_S = 2.0
_WITHIN_S = 60.0
_NEWER = 4  # publications between two rounds, at least


class _Watch:
    """A thread that asks one scorer and notes when the version of its answers changed."""

    def __init__(self, url: str, request: dict[str, Any]) -> None:
        self._url, self._request = url, request
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.changes: list[tuple[int, tuple[str, int]]] = []
        """(Unix milliseconds, (lineage, version)) of each answer of another version than the one before."""
        self.errors: list[str] = []

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    @property
    def now(self) -> tuple[str, int] | None:
        return self.changes[-1][1] if self.changes else None

    def since(self, at_ms: int) -> list[tuple[int, tuple[str, int]]]:
        return [change for change in self.changes if change[0] >= at_ms]

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=5.0) as client:
            while not self._stopped.wait(_PAUSE_S):
                try:
                    answer = client.post("/v1/score", json=self._request)
                    answer.raise_for_status()
                    body = answer.json()
                except (httpx.HTTPError, ValueError) as error:
                    self.errors.append(f"{type(error).__name__}: {error}")
                    continue
                version = (str(body["lineage"]), int(body["version"]))
                if version != self.now:
                    self.changes.append((wall_clock_ms(), version))


def run_rollback(system: System, replayed: Replayed, *, rounds: int) -> dict[str, Any]:
    """Roll back again and again.

    Args:
        system: Its servers are fresh.
        replayed: What is trained on meanwhile.
        rounds: How many times.

    Raises:
        ChaosError: A command failed, or a scorer did not follow.
    """
    config = system.write_config("rollback", schema=replayed.schema)
    loaded = prepare(system, config, replayed)
    urls = scorer_urls(_SCORERS)
    processes = {
        name: system.start_plain(name, config, "serve", "--port", url.rpartition(":")[2]) for name, url in urls.items()
    }
    processes["train"] = system.start_plain("train", config, "train")
    start_replay(system, config, replayed, 60.0 + 15.0 * rounds)
    system.await_ready(list(urls.values()), processes)
    request = {"user_id": loaded["users_sample"][0], "context": {}, "items": loaded["items_sample"][:10]}
    watches = [_Watch(url, request) for url in urls.values()]
    settings = read_config(config).feature_store
    with ExitStack() as stack:
        client = stack.enter_context(connect(settings.redis_url, settings.timeout_s))
        store = SnapshotStore(client, settings.namespace, settings.snapshots)
        for watch in watches:
            watch.start()
            stack.callback(watch.stop)
        found = [_round(system, config, store, watches) for _ in range(rounds)]
    for name, process in processes.items():
        system.check_alive(name, process)
    return {
        "rollback_s": max(each["slowest_s"] for each in found),
        "rollback_median_s": sorted(each["slowest_s"] for each in found)[rounds // 2],
        "rollback_command_s": max(each["command_s"] for each in found),
        "rollback_rounds": rounds,
        "published_meanwhile": sum(each["published"] for each in found),
        "left_the_old_version": sum(each["left"] for each in found),
        "scorer_errors": sum(len(watch.errors) for watch in watches),
        "happened": found,
    }


def _round(system: System, config: Path, store: SnapshotStore, watches: Sequence[_Watch]) -> dict[str, Any]:
    """One rollback, and back to what is current."""
    first = store.current()
    assert first is not None
    _await("newer versions", lambda: _version(store) >= first.version + _NEWER, system)
    before = store.current()
    assert before is not None
    began_s = time.monotonic()
    _command(system, config, "rollback", str(first.version), "--why", "chaos")
    command_s = time.monotonic() - began_s
    decision = store.pins.decision()
    if decision is None or (decision.lineage, decision.version) != (first.lineage, first.version):
        raise ChaosError(f"rollback to {first.lineage}:{first.version}: the record says {decision}")
    target = (first.lineage, first.version)
    _await("every scorer at the old version", lambda: all(watch.now == target for watch in watches), system)
    published = _version(store)
    time.sleep(_STAYS_S)
    slowest_ms = 0
    left = 0
    for watch in watches:
        after = watch.since(decision.at_ms)
        reached = [number for number, (_, version) in enumerate(after) if version == target]
        slowest_ms = max(slowest_ms, after[reached[0]][0] - decision.at_ms)
        left += len(after) - 1 - reached[0]
    entry = {
        "slowest_s": slowest_ms / 1000,
        "command_s": round(command_s, 2),
        "published": _version(store) - published,
        "left": left,
    }
    print(f"  {entry}", flush=True)
    _command(system, config, "unpin", "--why", "chaos")
    _await(
        "every scorer at a newer version",
        lambda: all((watch.now or target)[1] > first.version for watch in watches),
        system,
    )
    return entry


def _version(store: SnapshotStore) -> int:
    current = store.current()
    assert current is not None
    return current.version


def _command(system: System, config: Path, *arguments: str) -> None:
    argv = [sys.executable, "-P", "-m", "smes_cli", "-c", str(config), "snapshots", *arguments]
    done = subprocess.run(argv, env=environment(), cwd=system.folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ChaosError(f"smes snapshots {' '.join(arguments)}: status {done.returncode}:\n{done.stderr[-2000:]}")


def _await(what: str, condition: Callable[[], bool], system: System) -> None:
    if not wait_until(condition, timeout_s=_WITHIN_S, pauses_s=(0.02,)):
        raise ChaosError(f"{what}: not in {_WITHIN_S:g} s:\n{system.tail('train')}")
