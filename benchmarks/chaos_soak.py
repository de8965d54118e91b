"""A long run at a steady rate with ever new ids: memory, descriptors and threads must not grow.

Users and items come from ranges that move on all the time, so that the id table is at its budget after a while, gives
rows to new ids and takes them from old ones. The event log is trimmed. Everything is measured every few seconds, and
the time after the warm-up is compared with the end.
"""

import multiprocessing
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import redis

from benchmarks.chaos_client import Caller
from benchmarks.chaos_system import ChaosError, System, read_config, read_json, scorer_urls
from benchmarks.freshness_traffic import Population, Traffic, produce
from smes.events import ImpressionBlock
from smes_cli.compile_loops import compile_loops
from trainer.report import conservation_errors

_EVERY_S = 2.0
_USERS, _ITEMS = 4000, 2000
_IMPRESSIONS_PER_NEW_USER, _IMPRESSIONS_PER_NEW_ITEM = 4, 8
_BUDGET = 10_000
_WARM_UP_SHARE, _WINDOW_SHARE = 0.4, 0.1
_MIB = 1024 * 1024


class NewIds(Traffic):
    """Traffic whose users and items are replaced by new ones as it goes on."""

    _shown = 0

    def impressions(self, count: int, tick: int, now_ms: int) -> ImpressionBlock:
        """As those of the base class, from the ids of this moment."""
        block = super().impressions(count, tick, now_ms)
        block.ids[:, 0] += self._shown // _IMPRESSIONS_PER_NEW_USER
        block.ids[:, 1] += self._shown // _IMPRESSIONS_PER_NEW_ITEM
        self._shown += count
        return block


def run_soak(system: System, *, minutes: float, events_per_s: float, seed: int) -> dict[str, Any]:
    """Produce, train, serve and ask for so long, and measure.

    Args:
        system: Its servers are fresh.
        minutes: In all; two fifths of it are the warm-up.
        events_per_s: Impressions and feedback together.
        seed: Of the traffic.

    Raises:
        ChaosError: A process failed.
    """
    config = system.write_config(
        "soak",
        rows={"budget": _BUDGET},
        stream={"batch": {"size": 256, "max_wait_s": 0.5}, "idle_after_s": 2.0},
        event_log={"redis": {"max_entries_per_partition": 2000}},
        feature_store={"snapshots": {"retain_bytes": 64 * _MIB}},
        trainer={"snapshot_interval_s": 1.0, "checkpoint": {"interval_s": 10.0}},
    )
    read = read_config(config)
    compile_loops(read, read.schema_file().schema)
    [(name, url)] = scorer_urls(1).items()
    seconds, produced = 60 * minutes, system.folder / "produced"
    trainer = system.start_plain("train", config, "train", "--flush", "--report", str(system.folder / "train.json"))
    scorer = system.start_plain(name, config, "serve", "--port", url.rpartition(":")[2])
    context = multiprocessing.get_context("spawn")
    traffic = NewIds(read.schema_file().schema, Population(_USERS, _ITEMS), first_id=1, seed=seed)
    producer = context.Process(target=produce, args=(read, traffic, events_per_s, seconds, produced), daemon=True)
    producer.start()
    system.stack.callback(producer.kill)
    system.await_ready([url], {name: scorer, "train": trainer})
    tasks = [task.name for task in read.schema_file().schema.tasks]
    caller = Caller({name: url}, np.arange(_USERS), np.arange(_ITEMS), tasks, per_s=5.0, seed=seed)
    caller.start()
    servers = {"broker": system.broker.pid, "store": system.store.pid}
    samples = _measure(system, {"trainer": trainer.pid, "scorer": scorer.pid, **servers}, producer.is_alive)
    producer.join()
    if producer.exitcode:
        raise ChaosError(f"the producer ended with status {producer.exitcode}")
    system.check_alive(name, scorer)
    answers = caller.stop()
    system.finish("train", trainer, terminate=True)
    report = read_json(system.folder / "train.json")
    appended, took_s, _ = (float(text) for text in produced.read_text().split())
    return {
        "soak_minutes": round(took_s / 60, 2),
        "soak_events_per_s": appended / took_s,
        **growth(samples, _WARM_UP_SHARE),
        "rows_in_use": report["rows"]["in_use"],
        "rows_replaced": report["rows"]["replaced"],
        "ledger_errors": conservation_errors(report),
        **answers.to_json(),
    }


Samples = dict[str, list[float]]


def _measure(system: System, pids: dict[str, int], goes_on: Callable[[], bool]) -> Samples:
    """Memory (MiB), descriptors and threads of each process, and the memory that the Redis servers use (MiB)."""
    samples: Samples = defaultdict(list)
    processes = {name: psutil.Process(pid) for name, pid in pids.items()}
    ports = [server.port for server in (system.broker, system.store) if server.kind == "redis"]
    clients = [redis.Redis(port=port or 0, socket_timeout=10) for port in ports]
    while goes_on():
        for name, process in processes.items():
            samples[f"rss.{name}"].append(process.memory_info().rss / _MIB)
            samples[f"descriptors.{name}"].append(process.num_fds())
            samples[f"threads.{name}"].append(process.num_threads())
        used = [client.info("memory")["used_memory"] / _MIB for client in clients]
        samples["redis.used"].append(sum(used))
        time.sleep(_EVERY_S)
    for client in clients:
        client.close()
    return samples


def growth(samples: Samples, warm_up_share: float) -> dict[str, Any]:
    """From the time after the warm-up to the end: medians of a tenth of the run each.

    ``rss_growth_pct`` and ``redis_growth_pct`` are the largest of a process and of the Redis servers, in percent;
    ``descriptors_growth`` and ``threads_growth`` the largest of trainer and scorer.
    """
    ends: dict[str, tuple[float, float]] = {}
    for name, values in samples.items():
        length = max(1, int(_WINDOW_SHARE * len(values)))
        begin = int(warm_up_share * len(values))
        ends[name] = float(np.median(values[begin : begin + length])), float(np.median(values[-length:]))
    percent = {name: 100 * (after / before - 1) for name, (before, after) in ends.items() if before}
    ours = ("trainer", "scorer")
    return {
        "rss_growth_pct": max(percent[f"rss.{name}"] for name in ours),
        "redis_growth_pct": percent["redis.used"],
        "descriptors_growth": max(ends[f"descriptors.{name}"][1] - ends[f"descriptors.{name}"][0] for name in ours),
        "threads_growth": max(ends[f"threads.{name}"][1] - ends[f"threads.{name}"][0] for name in ours),
        "measured": {name: [round(value, 2) for value in pair] for name, pair in sorted(ends.items())},
    }
