"""Live traffic for the freshness benchmark: events that happen now, and scoring requests, each in its own process.

Impressions show a uniformly drawn user an item whose popularity falls with its rank. Feedback follows each by the
synthetic world's rates, after delays of a second in the middle. Letters: N impressions of a tick, T tasks.
"""

import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np

from smes.arrays import I64
from smes.events import FeedbackBlock, ImpressionBlock
from smes.schema import Schema
from smes_cli.config import Config
from smes_io.clock import wall_clock_ms
from stream.codec.codec import encode_feedback, encode_impressions
from stream.log.open_log import open_event_log
from stream.topics import FEEDBACK, IMPRESSIONS

_TICK_S = 0.02
_RATES = {"click": 0.35, "long_view": 0.2, "watch_time": 0.35, "like": 0.03, "profile_enter": 0.03}
_DELAY_MEDIAN_S, _DELAY_SIGMA, _LONGEST_DELAY_S = 1.0, 0.5, 4.5
_ITEMS_PER_REQUEST = 50
FEEDBACK_PER_IMPRESSION = sum(_RATES.values())


@dataclass(frozen=True)
class Population:
    """Ids that events are drawn from: ``users`` + ``items`` rows of the table, and a few of their features."""

    users: int
    items: int

    @classmethod
    def of_rows(cls, rows: int) -> "Population":
        return cls(rows * 6 // 10, rows - rows * 6 // 10)


class Traffic:
    """Makes the events of each moment.

    Args:
        schema: The built-in schema ``synthetic``.
        population: Who and what.
        first_id: Of the impressions.
        seed: Of everything random.
    """

    def __init__(self, schema: Schema, population: Population, first_id: int, seed: int) -> None:
        self._schema, self._population, self._next_id = schema, population, first_id
        self._rng = np.random.default_rng(seed)
        self._tasks = [(schema.task_index[name], rate) for name, rate in _RATES.items()]
        self._coming: dict[int, list[FeedbackBlock]] = defaultdict(list)  # number of a tick → its feedback

    def impressions(self, count: int, tick: int, now_ms: int) -> ImpressionBlock:
        """Impressions of now; their feedback will come in later ticks."""
        rng, people = self._rng, self._population
        block = ImpressionBlock.empty(self._schema, count)
        block.impression_id[:] = self._next_id + np.arange(count)
        self._next_id += count
        block.event_time_ms[:] = now_ms
        for name in ("user_segment", "item_category", "item_author", "tab", "device"):
            block.ids[:, self._schema.id_slices[name]] = rng.integers(0, 20, (count, 1))
        block.ids[:, 0] = rng.integers(0, people.users, count)
        block.ids[:, 1] = (people.items ** rng.random(count)).astype(np.int64) - 1
        block.numerics[:] = rng.random(block.numerics.shape)
        for task, rate in self._tasks:
            self._schedule(block.impression_id[rng.random(count) < rate], task, tick)
        return block

    def feedback(self, tick: int, now_ms: int) -> FeedbackBlock:
        """The feedback that has happened by this tick and was not given before."""
        ticks = [earlier for earlier in self._coming if earlier <= tick]
        blocks = [block for earlier in sorted(ticks) for block in self._coming.pop(earlier)]
        due = FeedbackBlock.concat([FeedbackBlock.empty(), *blocks])
        due.event_time_ms[:] = now_ms
        return due

    def _schedule(self, impression_id: I64, task: int, tick: int) -> None:
        delay_s = _DELAY_MEDIAN_S * np.exp(_DELAY_SIGMA * self._rng.normal(size=len(impression_id)))
        ticks = tick + 1 + (np.minimum(delay_s, _LONGEST_DELAY_S) / _TICK_S).astype(np.int64)
        for due in np.unique(ticks):
            ids = impression_id[ticks == due]
            block = FeedbackBlock.empty(len(ids))
            block.impression_id[:] = ids
            block.task[:] = task
            block.value[:] = 1
            self._coming[int(due)].append(block)


def produce(config: Config, traffic: Traffic, events_per_s: float, seconds: float, report: Path) -> None:
    """Append so many events of a traffic a second until the time is over.

    An append that takes longer than a tick makes the next one larger, not later events. Writes how many were appended,
    in how many seconds, and how long an append took at worst.
    """
    schema, partitions = config.schema_file().schema, config.event_log.partitions
    log = open_event_log(config.event_log)
    impressions_per_s = events_per_s / (1 + FEEDBACK_PER_IMPRESSION)
    begin_s, shown, appended, worst_s = time.monotonic(), 0, 0, 0.0
    while (passed_s := time.monotonic() - begin_s) < seconds:
        tick, now_ms = int(passed_s / _TICK_S), wall_clock_ms()
        impressions = traffic.impressions(int(impressions_per_s * passed_s) - shown, tick, now_ms)
        feedback = traffic.feedback(tick, now_ms)
        shown += len(impressions)
        appended += len(impressions) + len(feedback)
        if len(impressions):
            log.append(IMPRESSIONS, encode_impressions(impressions, schema, "arrow", partitions))
        if len(feedback):
            log.append(FEEDBACK, encode_feedback(feedback, schema, "arrow", partitions))
        took_s = time.monotonic() - begin_s - passed_s
        worst_s = max(worst_s, took_s)
        time.sleep(max(0.0, _TICK_S - took_s))
    log.close()
    report.write_text(f"{appended} {time.monotonic() - begin_s} {worst_s}")


def ask(url: str, population: Population, per_s: float, seconds: float, report: Path) -> None:
    """Ask for rankings; writes a line for each version: lineage, version, Unix milliseconds of its first answer."""
    rng, seen, begin_s = np.random.default_rng(2), {}, time.monotonic()
    errors = number = 0
    with httpx.Client(base_url=url, timeout=10.0) as client, report.open("w") as file:
        while time.monotonic() < begin_s + seconds:
            time.sleep(max(0.0, begin_s + number / per_s - time.monotonic()))
            number += 1
            items = rng.integers(0, population.items, _ITEMS_PER_REQUEST).tolist()
            answer = client.post("/v1/score", json={"user_id": int(rng.integers(0, population.users)), "items": items})
            now_ms = wall_clock_ms()
            if answer.status_code != 200:
                errors += 1
                continue
            body = answer.json()
            version = body["lineage"], body["version"]
            if version not in seen:
                seen[version] = now_ms
                file.write(f"{version[0]} {version[1]} {now_ms}\n")
                file.flush()
        file.write(f"errors {errors} {number}\n")
