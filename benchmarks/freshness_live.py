"""Freshness of a whole system under live traffic: Valkey, ``smes train``, ``smes serve``, a producer and a caller.

The table has its rows before it begins: a checkpoint is written with rows for every id that the traffic draws from.
Then events happen in real time, and each feedback event counts from its arrival in the log to the first answer, seen by
the caller, of a version that was trained on it. Counted are the events that arrive while the time is taken, which is
after a warm-up. The stages are the scorer's own, of the same time.
"""

import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.freshness_traffic import Population, Traffic, ask, produce
from feature_store.config import SnapshotStoreConfig
from feature_store.feedback_times import FeedbackTimes
from feature_store.snapshots import SnapshotStore
from smes.arrays import F64, I64
from smes.events import ExampleBlock
from smes_cli.building import build_evaluation, build_learner
from smes_cli.compile_loops import compile_loops
from smes_cli.config import Config
from smes_cli.demo.local_servers import start_valkey
from smes_cli.demo.processes import stop
from smes_cli.demo.workers import Workers
from smes_io.clock import wait_until, wall_clock_ms
from smes_io.redis_client import connect
from smes_scorer.freshness_stages import DEPENDS_ON
from stream.config import JoinConfig
from stream.dead_letters import DeadLetterWriter
from stream.example_stream import ExampleStream
from stream.log.open_log import open_event_log
from stream.topics import FEEDBACK, IMPRESSIONS
from trainer.checkpoints import CheckpointDirectory
from trainer.loop import Trainer
from trainer.schedule import Flags

_BLOCK = 65_536  # examples that get rows at once
_READY_WITHIN_S, _SETTLE_S = 300.0, 20.0
_GIB = 1024**3


@dataclass(frozen=True)
class LiveSetting:
    """One run.

    Attributes:
        rows: Of the id table, about, before it begins.
        events_per_s: Impressions and feedback together.
        requests_per_s: Rankings of 50 items asked for.
        warm_up_s: Before the time is taken.
        seconds: Of the time that is taken.
        size: Most examples in a batch.
        snapshot_interval_s: Between cuts.
        allowed_lateness_s: Of the join.
    """

    rows: int
    events_per_s: float = 5000.0
    requests_per_s: float = 20.0
    warm_up_s: float = 20.0
    seconds: float = 60.0
    size: int = 512
    snapshot_interval_s: float = 0.5
    allowed_lateness_s: float = 0.1


@dataclass(frozen=True)
class LiveFigures:
    """Of one run.

    Attributes:
        p50_ms, p99_ms: Freshness.
        counted: Feedback events.
        events_per_s: Appended, in the whole run.
        versions: That answered while the time was taken.
        stages_ms: Stage → mean.
        cores: Process → cores in use, mean.
        errors: Requests that failed.
    """

    p50_ms: float
    p99_ms: float
    counted: int
    events_per_s: float
    versions: int
    stages_ms: Mapping[str, float]
    cores: Mapping[str, float]
    errors: int

    def to_json(self, suffix: str) -> dict[str, float]:
        flat = {"p50_ms": self.p50_ms, "p99_ms": self.p99_ms, "events_per_s": self.events_per_s}
        flat |= {f"stage_{stage}_mean_ms": ms for stage, ms in self.stages_ms.items()}
        flat |= {f"cores_{name}": cores for name, cores in self.cores.items()}
        flat |= {"feedback_counted": self.counted, "versions": self.versions, "errors": self.errors}
        return {f"freshness_{name}{suffix}": value for name, value in flat.items()}


def run_live(setting: LiveSetting) -> LiveFigures:
    """Start everything, take the time, stop everything.

    Raises:
        SmesError: A process did not start or ended too early.
        RuntimeError: Nothing was counted.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="smes-freshness-")))
        server = stack.enter_context(start_valkey(folder / "valkey"))
        config, population = _config(setting, server.url, folder), Population.of_rows(setting.rows)
        compile_loops(config, config.schema_file().schema)
        context = multiprocessing.get_context("spawn")
        _finish(context.Process(target=fill_table, args=(config, population)))
        workers = Workers(config, folder, stack)
        trainer, scorer = workers.start("train", "--report", str(folder / "train.json")), workers.start("serve")
        url = workers.printed_url("serve", scorer)
        _await_ready(url, workers, {"train": trainer, "serve": scorer})
        seconds = setting.warm_up_s + setting.seconds
        traffic = Traffic(config.schema_file().schema, population, first_id=wall_clock_ms(), seed=1)
        produced, answers = folder / "produced", folder / "answers"
        others = [
            context.Process(target=produce, args=(config, traffic, setting.events_per_s, seconds, produced)),
            context.Process(target=ask, args=(url, population, setting.requests_per_s, seconds + _SETTLE_S, answers)),
        ]
        for process in others:
            stack.enter_context(_ended(process))
            process.start()
        pids = {"trainer": trainer.pid, "scorer": scorer.pid, "valkey": server.pid}
        time.sleep(setting.warm_up_s)
        begin_ms, before, used = wall_clock_ms(), _stage_sums(url), _cpu_seconds(pids)
        time.sleep(setting.seconds)
        end_ms, after, used_after = wall_clock_ms(), _stage_sums(url), _cpu_seconds(pids)
        for process in others:
            process.join()
        stop(trainer, timeout_s=120)
        appended, produced_s, worst_s = (float(text) for text in produced.read_text().split())
        print(f"  the producer's slowest append took {1000 * worst_s:.0f} ms", flush=True)
        first_ms, errors = _first_answers(answers)
        freshness_ms, count, versions = _freshness(config, first_ms, begin_ms, end_ms)
    return LiveFigures(
        p50_ms=_quantile(freshness_ms, count, 0.5),
        p99_ms=_quantile(freshness_ms, count, 0.99),
        counted=int(count.sum()),
        events_per_s=appended / produced_s,
        versions=versions,
        stages_ms={stage: _mean(before[stage], after[stage]) for stage in DEPENDS_ON},
        cores={name: 1000 * (used_after[name] - used[name]) / (end_ms - begin_ms) for name in pids},
        errors=errors,
    )


def fill_table(config: Config, population: Population) -> None:
    """Write a checkpoint of a table with a row for every user and item, after one step."""
    schema = config.schema_file().schema
    log = open_event_log(config.event_log)
    for topic in (IMPRESSIONS, FEEDBACK):
        log.ensure_topic(topic, config.event_log.partitions)
    learner = build_learner(config, schema)
    stream = ExampleStream(schema, config.stream, log, DeadLetterWriter(log))
    directory = config.trainer.checkpoint.directory
    assert directory is not None
    checkpoints = CheckpointDirectory(directory, config.trainer.checkpoint.keep)
    trainer = Trainer(learner, stream, build_evaluation(config, learner), Flags(), checkpoints=checkpoints)
    for start in range(0, max(population.users, population.items), _BLOCK):
        ids = start + np.arange(_BLOCK)
        examples = ExampleBlock.empty(schema, _BLOCK)
        examples.ids[:, 0], examples.ids[:, 1] = ids % population.users, ids % population.items
        batch = learner.prepare(examples)
        if start == 0:
            learner.step(batch)
    trainer.checkpoint()
    log.close()


def _config(setting: LiveSetting, redis_url: str, folder: Path) -> Config:
    config = Config(schema="synthetic")
    join = JoinConfig(wait={"default": "immediate"}, allowed_lateness_s=setting.allowed_lateness_s)
    stream = replace(config.stream, join=join, batch=replace(config.stream.batch, size=setting.size))
    return replace(
        config,
        event_log=replace(config.event_log, redis_url=redis_url, namespace="freshness"),
        stream=stream,
        trainer=replace(
            config.trainer,
            device="cpu",
            snapshot_interval_s=setting.snapshot_interval_s,
            checkpoint=replace(config.trainer.checkpoint, directory=folder / "checkpoints"),
        ),
        feature_store=replace(
            config.feature_store,
            redis_url=redis_url,
            namespace="freshness",
            snapshots=SnapshotStoreConfig(retain_bytes=4 * _GIB),
        ),
        scorer=replace(config.scorer, port=0, redis_timeout_s=60.0),
    )


def _await_ready(url: str, workers: Workers, processes: Mapping[str, Any]) -> None:
    def is_ready() -> bool:
        for name, process in processes.items():
            if process.poll() is not None:
                raise RuntimeError(f"smes {name} ended:\n{workers.log_of(name).read_text()}")
        return httpx.get(f"{url}/health/ready", timeout=10).status_code == 200

    if not wait_until(is_ready, timeout_s=_READY_WITHIN_S):
        raise RuntimeError(
            f"no snapshot in service within {_READY_WITHIN_S:g} s:\n{workers.log_of('train').read_text()}"
        )


def _finish(process: BaseProcess) -> None:
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the table was not filled: a process ended with status {process.exitcode}")


@contextmanager
def _ended(process: BaseProcess) -> Iterator[None]:
    """Kill a process that was started inside and has not ended."""
    try:
        yield
    finally:
        if process.is_alive():
            process.kill()
            process.join()


def _stage_sums(url: str) -> dict[str, tuple[float, float]]:
    """Stage → (sum of milliseconds, count) so far."""
    sums: dict[str, dict[str, float]] = {stage: {} for stage in DEPENDS_ON}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=10).text):
        for sample in family.samples:
            if family.name == "smes_scorer_freshness_stage_milliseconds":
                kind = sample.name.rpartition("_")[2]
                if kind in ("sum", "count"):
                    sums[sample.labels["stage"]][kind] = sample.value
    return {stage: (found.get("sum", 0.0), found.get("count", 0.0)) for stage, found in sums.items()}


def _mean(before: tuple[float, float], after: tuple[float, float]) -> float:
    return (after[0] - before[0]) / max(after[1] - before[1], 1)


def _cpu_seconds(pids: Mapping[str, int]) -> dict[str, float]:
    """Process → seconds of a core that it and its children have used."""
    used = {}
    for name, pid in pids.items():
        process = psutil.Process(pid)
        times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
        used[name] = sum(one.user + one.system for one in times)
    return used


def _first_answers(path: Path) -> tuple[dict[tuple[str, int], int], int]:
    """((Lineage, version) → when it first answered, failed requests)."""
    first_ms: dict[tuple[str, int], int] = {}
    errors = 0
    for line in path.read_text().splitlines():
        lineage, version, number = line.split()
        if lineage == "errors":
            errors = int(version)
        else:
            first_ms[lineage, int(version)] = int(number)
    return first_ms, errors


def _freshness(
    config: Config, first_ms: Mapping[tuple[str, int], int], begin_ms: int, end_ms: int
) -> tuple[I64, I64, int]:
    """(Freshness of the feedback that arrived in a time, its counts, versions that answered in it).

    Feedback of a version that never answered counts with the next one that did.
    """
    settings = config.feature_store
    with connect(settings.redis_url, settings.timeout_s) as client:
        manifests = SnapshotStore(client, settings.namespace, settings.snapshots).manifests_between(
            next(iter(first_ms))[0], -1, 2**52
        )
    freshness, counts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    answered = sorted((version, ms) for (_, version), ms in first_ms.items())
    for manifest in manifests:
        ms = next((ms for version, ms in answered if version >= manifest.version), None)
        rows = FeedbackTimes.of_rows(manifest.feedback_arrivals)
        inside = (rows.arrived_ms >= begin_ms) & (rows.arrived_ms < end_ms)
        if ms is not None:
            freshness.append(ms - rows.arrived_ms[inside])
            counts.append(rows.count[inside])
    versions = sum(begin_ms <= ms < end_ms for _, ms in answered)
    if not sum(map(len, counts)):
        raise RuntimeError("no feedback was answered in the time that was taken")
    return np.concatenate(freshness), np.concatenate(counts), versions


def _quantile(values: I64, weights: I64, q: float) -> float:
    order = np.argsort(values)
    cumulative: F64 = np.cumsum(weights[order]).astype(np.float64)
    return float(values[order[int(np.searchsorted(cumulative, q * cumulative[-1]))]])
