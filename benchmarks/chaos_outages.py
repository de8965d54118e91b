"""Everything else fails during one replay: servers, scorers, disk and clock, each for a while, one after the other.

A replay appends the whole time, and the scorers are asked the whole time. Whatever failed is started again, as a
supervisor would.
"""

import signal
import subprocess
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.chaos_client import Caller
from benchmarks.chaos_faults import CLOCK_JUMPS_S, Clock, Disk, Fault, make_disk, seconds_of
from benchmarks.chaos_kills import Replayed, compare_with_undisturbed, prepare, start_replay, task_names
from benchmarks.chaos_system import WAITING, Server, System, is_ready, newest_step, read_json, scorer_urls
from smes_cli.demo.local_servers import LocalServerError
from smes_io.clock import wait_until
from trainer.report import conservation_errors

_RESTART_S = 8.0  # about what a start of a process takes, for the length of the replay
_READY_AGAIN_S = 120.0


class _Run:
    """The processes of one run, and what is done to them."""

    def __init__(self, system: System, config: Path, disk: Disk, clock: Clock, scorers: int, seed: int) -> None:
        self.system, self.config, self._disk, self._clock = system, config, disk, clock
        self._rng = np.random.default_rng(seed)
        self.urls = scorer_urls(scorers)
        self.scorers = {name: self._start_scorer(name) for name in self.urls}
        self.trainer = self._start_trainer()
        self.caller: Caller | None = None
        self.exits: Counter[str] = Counter()

    def _start_scorer(self, name: str) -> subprocess.Popen[bytes]:
        return self.system.start(name, self.config, "serve", "--port", self.urls[name].rpartition(":")[2])

    def _start_trainer(self) -> subprocess.Popen[bytes]:
        self._begins = self.system.written("train")
        report = self.system.folder / "train.json"
        return self.system.start("train", self.config, "train", "--flush", "--report", str(report))

    def do(self, fault: Fault) -> None:
        """One fault, and the end of it."""
        what, _, how = fault.kind.partition(" ")
        if what in ("broker", "store"):
            self._fail_server(self.system.broker if what == "broker" else self.system.store, how, fault.seconds)
        elif what == "trainer":
            self._fail_trainer(how, fault.seconds)
        elif what == "scorer":
            self._fail_scorer(how, fault.seconds)
        elif what == "disk":
            self.await_training()
            with self._disk.full(self.trainer.pid):
                time.sleep(fault.seconds)
        else:
            self._clock.set(CLOCK_JUMPS_S[fault.kind])
            time.sleep(fault.seconds)
            self._clock.set(0)

    def _fail_server(self, server: Server, how: str, seconds: float) -> None:
        if how == "killed":
            server.kill()
            time.sleep(seconds)
            server.start()
        else:
            assert server.running is not None
            _pause(server.running.process, seconds)

    def _fail_trainer(self, how: str, seconds: float) -> None:
        if how == "killed":
            self.trainer.kill()
            self.trainer.wait()
            time.sleep(seconds)
            self.trainer = self._start_trainer()
        else:
            _pause(self.trainer, seconds)

    def _fail_scorer(self, how: str, seconds: float) -> None:
        assert self.caller is not None
        name = str(self._rng.choice(list(self.urls)))
        with self.caller.without(name):
            if how == "killed":
                self.scorers[name].kill()
                self.scorers[name].wait()
                time.sleep(seconds)
                self.scorers[name] = self._start_scorer(name)
            else:
                _pause(self.scorers[name], seconds)
            if not wait_until(lambda: is_ready(self.urls[name]), timeout_s=_READY_AGAIN_S):
                raise LocalServerError(f"{name}: not ready again in {_READY_AGAIN_S:g} s:\n{self.system.tail(name)}")

    def await_training(self) -> None:
        """Wait until the trainer has begun to read."""
        self.system.await_said("train", WAITING, self.trainer, after=self._begins)

    def supervise(self) -> None:
        """Start again what has ended by itself, and count it: nothing should."""
        if self.trainer.poll() is not None:
            self.exits["train"] += 1
            self.trainer = self._start_trainer()
        for name, scorer in self.scorers.items():
            if scorer.poll() is not None:
                self.exits[name] += 1
                self.scorers[name] = self._start_scorer(name)


def run_outages(system: System, replayed: Replayed, faults: list[Fault], *, seed: int) -> dict[str, Any]:
    """Replay while the faults happen, end well, audit and compare.

    Args:
        system: Its servers are fresh.
        replayed: What is replayed.
        faults: What happens.
        seed: Of the choice of scorers.

    Raises:
        ChaosError, LocalServerError: Something did not come back.
    """
    disk = make_disk(system.folder / "disk", system.stack)
    clock = Clock(system.folder / "clock")
    system.launcher = clock.launcher
    checkpoint = {"checkpoint": {"directory": str(disk.folder / "checkpoints")}}
    config = system.write_config("outages", schema=replayed.schema, trainer=checkpoint)
    loaded = prepare(system, config, replayed)
    scorers = 2 if any(fault.kind.startswith("scorer") for fault in faults) else 1  # one may be taken down
    run = _Run(system, config, disk, clock, scorers, seed)
    replay = start_replay(system, config, replayed, seconds_of(faults) + _RESTART_S * len(faults) / 2)
    system.await_ready(list(run.urls.values()), {**run.scorers, "train": run.trainer})
    users, items = np.array(loaded["users_sample"]), np.array(loaded["items_sample"])
    caller = run.caller = Caller(run.urls, users, items, task_names(config), seed=seed)
    caller.start()
    done: list[dict[str, Any]] = []
    for fault in faults:
        errors = caller.answers.errors
        time.sleep(fault.pause_s)
        began_s, before = time.monotonic(), newest_step(config)
        run.do(fault)
        run.supervise()
        took_s = time.monotonic() - began_s
        entry = {
            "fault": fault.kind,
            "seconds": round(took_s, 1),
            "step_before": before,
            "step_after": newest_step(config),
        }
        done.append(entry | {"scorer_errors": caller.answers.errors - errors})
        print(f"  {entry}", flush=True)
    replay_ended = replay.poll() is not None
    system.finish("replay", replay, terminate=False)
    run.supervise()
    run.await_training()
    system.finish("train", run.trainer, terminate=True)
    answers = caller.stop()
    report = read_json(system.folder / "train.json")
    audit = system.audit(config)
    whole, learner, _ = compare_with_undisturbed(system, config, replayed)
    return {
        "faults": dict(Counter(fault.kind for fault in faults)),
        "disk_full_by": disk.way,
        "checkpoints_refused": system.log_of("train").read_text(errors="replace").count("not written"),
        "happened": done,
        "replay_ended_before_the_last_fault": replay_ended,
        "exits": dict(run.exits),
        "impressions": report["events"]["impressions"],
        "trained": report["events"]["trained"],
        "duplicates": report["events"]["duplicate"],
        "digests_equal": whole and learner,
        "digests_of_weights_equal": learner,
        "audit_balanced": audit["balanced"],
        "audit_imbalances": audit["imbalances"],
        "ledger_errors": conservation_errors(report),
        **answers.to_json(),
    }


def _pause(process: subprocess.Popen[bytes], seconds: float) -> None:
    """SIGSTOP, and later SIGCONT."""
    with ExitStack() as stack:
        process.send_signal(signal.SIGSTOP)
        stack.callback(process.send_signal, signal.SIGCONT)
        time.sleep(seconds)
