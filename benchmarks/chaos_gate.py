"""What the gate and a cut every second cost: training throughput with both against without both.

A trainer reads a whole event log that is there already, as fast as it can. With both, with cuts alone and without both
take turns, and every other round takes them in the reverse order, so that a machine that becomes slower slows all of
them. Every run begins with nothing.
"""

import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.chaos_kills import Replayed
from benchmarks.chaos_system import System, read_config
from simulators.logs.reader import open_log
from simulators.merge import replay_blocks
from smes_cli.compile_loops import compile_loops
from stream.codec.codec import encode_feedback, encode_impressions
from stream.log.open_log import open_event_log
from stream.topics import FEEDBACK, IMPRESSIONS

_NEVER_S = 1e6
_WAYS: dict[str, dict[str, Any]] = {
    "with": {"snapshot_interval_s": 1.0, "gate": {"enabled": True}},
    "cuts": {"snapshot_interval_s": 1.0, "gate": {"enabled": False}},
    "without": {"snapshot_interval_s": _NEVER_S, "gate": {"enabled": False}},
}


def run_gate(system: System, replayed: Replayed, *, rounds: int) -> dict[str, Any]:
    """Train on the log ``3 * rounds`` times.

    Args:
        system: Its servers are fresh.
        replayed: What is trained on.
        rounds: At least 5 for a figure to quote.

    Raises:
        ChaosError: A trainer failed.
    """
    log_config = system.write_config("gate", schema=replayed.schema)
    _fill(log_config, replayed)
    rates: dict[str, list[float]] = {name: [] for name in _WAYS}
    published: list[int] = []
    for number in range(rounds):
        for name in list(_WAYS) if number % 2 else list(reversed(_WAYS)):
            report = _train(system, f"{name}-{number}", replayed, _WAYS[name])
            rates[name].append(report["throughput"]["trained_per_s"])
            if name == "with":
                published.append(report["snapshots"]["published"])
            print(f"  round {number + 1}, {name}: {rates[name][-1]:,.0f} examples/s", flush=True)
    ratios = np.array(rates["with"]) / np.array(rates["without"])
    of_cuts = np.array(rates["cuts"]) / np.array(rates["without"])
    return {
        "gate_throughput_ratio": float(np.median(ratios)),
        "gate_throughput_ratio_lowest": float(ratios.min()),
        "gate_throughput_ratio_highest": float(ratios.max()),
        "cuts_throughput_ratio": float(np.median(of_cuts)),
        "trained_per_s_with": float(np.median(rates["with"])),
        "trained_per_s_without": float(np.median(rates["without"])),
        "gate_rounds": rounds,
        "gate_published": published,
    }


def _fill(config: Path, replayed: Replayed) -> None:
    """Append everything, and compile what each process would compile."""
    read = read_config(config)
    schema_file = read.schema_file()
    schema, partitions = schema_file.schema, read.event_log.partitions
    compile_loops(read, schema)
    with (
        closing(open_event_log(read.event_log)) as log,
        open_log(replayed.log, schema_file, limit=replayed.limit) as reader,
    ):
        for topic in (IMPRESSIONS, FEEDBACK):
            log.ensure_topic(topic, partitions)
        for impressions, feedback in replay_blocks(reader, read.replay.seed):
            if len(impressions):
                log.append(IMPRESSIONS, encode_impressions(impressions, schema, "arrow", partitions))
            if len(feedback):
                log.append(FEEDBACK, encode_feedback(feedback, schema, "arrow", partitions))


def _train(system: System, name: str, replayed: Replayed, way: dict[str, Any]) -> dict[str, Any]:
    config = system.write_config(
        name,
        log_namespace="gate",
        schema=replayed.schema,
        trainer={**way, "checkpoint": {"interval_s": 30.0}},
        stream={"batch": {"size": 256}},
    )
    report = system.train_to_the_end(f"train-{name}", config)
    directory = read_config(config).trainer.checkpoint.directory
    assert directory is not None
    shutil.rmtree(directory)
    return report
