"""The trainer is killed again and again during one replay; it must end as one that was never killed.

Both trainers read the same event log. The one that is killed reads it while the replay fills it, the other one reads it
afterwards, all at once. So the end may depend neither on the kills nor on how much was there at each read.
"""

import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.chaos_client import Caller
from benchmarks.chaos_system import (
    WAITING,
    System,
    checkpoint_digest,
    count_events,
    newest_step,
    read_config,
    read_json,
    scorer_urls,
)
from smes_cli.compile_loops import compile_loops
from smes_cli.features import load_features
from trainer.report import conservation_errors

_LEARNER = "learner."
_SLOWER_START = 1.3  # a start with a checkpoint, while a replay runs, against one without


@dataclass(frozen=True)
class Replayed:
    """What is replayed.

    Attributes:
        log: A log with a built-in schema.
        limit: Impressions.
        schema: ``synthetic`` or ``kuairand``.
    """

    log: Path
    limit: int
    schema: str


def prepare(system: System, config: Path, replayed: Replayed) -> dict[str, Any]:
    """Compile once, create the topics and load the features; ids to ask for."""
    read = read_config(config)
    compile_loops(read, read.schema_file().schema)
    return load_features(read, replayed.log)


def start_replay(system: System, config: Path, replayed: Replayed, seconds: float) -> subprocess.Popen[bytes]:
    """A replay that takes so long."""
    rate = count_events(config, replayed.log, replayed.limit) / seconds
    report = system.folder / "replay.json"
    arguments = ["--limit", str(replayed.limit), "--rate", f"{rate:.3f}", "--report", str(report)]
    return system.start_plain("replay", config, "replay", str(replayed.log), *arguments)


def run_kills(system: System, replayed: Replayed, *, kills: int, life_s: float, seed: int) -> dict[str, Any]:
    """Kill the trainer at seeded moments.

    A quarter of the kills come while it starts, at up to 2 s after its start. The others come at up to ``life_s`` after
    it has begun to train.

    Args:
        system: Its servers are fresh.
        replayed: What is replayed.
        kills: How many.
        life_s: Longest time from a life's first event to its kill.
        seed: Of the moments.

    Raises:
        ChaosError: A process failed by itself.
    """
    rng = np.random.default_rng(seed)
    config = system.write_config("kills", schema=replayed.schema, trainer={"lease_s": 1.0})
    loaded = prepare(system, config, replayed)
    urls = scorer_urls(1)
    [(name, url)] = urls.items()
    scorer = system.start_plain(name, config, "serve", "--port", url.rpartition(":")[2])
    began_s = time.monotonic()
    trainer = system.start_plain("train", config, "train")
    system.await_said("train", WAITING, trainer)
    start_s = time.monotonic() - began_s
    replay = start_replay(system, config, replayed, kills * (_SLOWER_START * start_s + 0.5 * life_s))
    system.await_ready([url], {name: scorer, "train": trainer})
    caller = Caller(
        urls, np.array(loaded["users_sample"]), np.array(loaded["items_sample"]), task_names(config), seed=seed
    )
    caller.start()
    steps: list[int] = []
    begins = 0
    for number in range(kills):
        if number:
            trainer = system.start_plain("train", config, "train")
        early = rng.random() < 0.25
        wait_s = float(rng.random()) * (2.0 if early else life_s)
        if not early and number:
            system.await_said("train", WAITING, trainer, after=begins)
        time.sleep(wait_s)
        system.check_alive("train", trainer)
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
        begins = system.written("train")
        steps.append(newest_step(config))
        print(f"  kill {number + 1}: {'while it started' if early else 'in training'}, step {steps[-1]}", flush=True)
    replay_ended = replay.poll() is not None
    trainer = system.start_plain("train", config, "train", "--flush", "--report", str(system.folder / "train.json"))
    system.await_said("train", WAITING, trainer, after=begins)
    system.finish("replay", replay, terminate=False)
    system.finish("train", trainer, terminate=True)
    answers = caller.stop()
    system.check_alive(name, scorer)
    report = read_json(system.folder / "train.json")
    audit = system.audit(config)
    whole, learner, reference = compare_with_undisturbed(system, config, replayed)
    return {
        "kills": kills,
        "kills_that_moved_on": sum(after > before for before, after in zip([-1, *steps], steps, strict=False)),
        "killed_at_steps": steps,
        "replay_ended_before_the_last_kill": replay_ended,
        "impressions": report["events"]["impressions"],
        "trained": report["events"]["trained"],
        "digests_equal": learner and whole,
        "digests_of_weights_equal": learner,
        "digest": checkpoint_digest(config),
        "digest_undisturbed": checkpoint_digest(reference),
        "audit_balanced": audit["balanced"],
        "audit_imbalances": audit["imbalances"],
        "ledger_errors": conservation_errors(report),
        **answers.to_json(),
    }


def compare_with_undisturbed(system: System, config: Path, replayed: Replayed) -> tuple[bool, bool, Path]:
    """Train on the same event log without any fault: (whole checkpoints equal, learners equal, its configuration)."""
    name = config.stem
    reference = system.write_config(f"{name}-undisturbed", log_namespace=name, schema=replayed.schema)
    system.train_to_the_end(f"train-{name}-undisturbed", reference)
    whole = checkpoint_digest(config) == checkpoint_digest(reference)
    return whole, checkpoint_digest(config, _LEARNER) == checkpoint_digest(reference, _LEARNER), reference


def task_names(config: Path) -> list[str]:
    return [task.name for task in read_config(config).schema_file().schema.tasks]
