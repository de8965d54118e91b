"""Writes a synthetic log: one Parquet file with impressions and outcomes, and one with the true probabilities.

A log of N impressions equals the first N impressions of every longer log with the same seed and configuration.

Letters: N impressions, T binary tasks, L entries of a list.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from simulators.world import COUNTRIES, OUTCOME_TASKS, TASK_NAMES, World, WorldConfig
from smes.arrays import F32, F64, I64, Bool
from smes.errors import LogError

Columns = dict[str, Any]

CHUNK_REQUESTS = 1024
ROW_GROUP_CHUNKS = 16


@dataclass(frozen=True)
class SyntheticSummary:
    """What was written.

    Attributes:
        log: File with the impressions. The built-in schema ``synthetic`` describes it.
        truth: File with ``impression_id`` and the true probability of every binary task.
        impressions: Number of rows in each file.
        users, items: Number of distinct users and items.
        span_s: Event time from the first impression to the last.
        positives: Name of each binary task → number of positive outcomes.
    """

    log: Path
    truth: Path
    impressions: int
    users: int
    items: int
    span_s: float
    positives: dict[str, int]


def truth_path(log: Path) -> Path:
    """The file with the true probabilities of a synthetic log: ``x.parquet`` → ``x.truth.parquet``."""
    return log.with_suffix(".truth.parquet")


def synthesize(
    out: Path,
    impressions: int,
    seed: int,
    *,
    config: WorldConfig | None = None,
    on_progress: Callable[[int], None] = lambda written: None,
) -> SyntheticSummary:
    """Write a synthetic log and its true probabilities, in bounded memory.

    Files that exist already are replaced, but only when both new files are complete.

    Args:
        out: A file name that ends in ``.parquet``.
        impressions: How many impressions, at least 1.
        seed: Seed of the world and of everything that happens in it, at least 0.
        config: Size and pace of the world.
        on_progress: Called with the number of impressions written so far.

    Raises:
        ValueError: An argument is out of range.
        LogError: The files cannot be written.
    """
    if out.suffix != ".parquet":
        raise ValueError(f"{out}: expected a file name that ends in .parquet")
    if impressions < 1 or seed < 0:
        raise ValueError(f"{impressions} impressions with seed {seed}, expected at least 1 and at least 0")
    world = World(seed, config)
    summary = _Tally()
    finals = (out, truth_path(out))
    partials = [path.with_name(path.name + ".partial") for path in finals]
    try:
        _write(world, impressions, partials, summary, on_progress)
        for partial, final in zip(partials, finals, strict=True):
            partial.replace(final)
    except OSError as error:
        raise LogError(f"{out}: expected to be able to write it ({error})") from error
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)
    return SyntheticSummary(
        *finals, impressions, len(summary.users), len(summary.items), summary.span_ms / 1000, summary.positives
    )


class _Tally:
    """Running totals of what was written."""

    def __init__(self) -> None:
        self.users: set[int] = set()
        self.items: set[int] = set()
        self.positives = dict.fromkeys(TASK_NAMES, 0)
        self.span_ms = 0
        self._start_ms: int | None = None

    def add(self, log: Columns) -> None:
        self.users.update(np.unique(log["user_id"]).tolist())
        self.items.update(np.unique(log["item_id"]).tolist())
        times = log["event_time_ms"]
        self._start_ms = int(times[0]) if self._start_ms is None else self._start_ms
        self.span_ms = int(times[-1]) - self._start_ms
        for name in TASK_NAMES:
            self.positives[name] += int(log[name].sum())


def _write(
    world: World, impressions: int, paths: list[Path], tally: _Tally, on_progress: Callable[[int], None]
) -> None:
    writers: list[Any] = []
    written = 0
    try:
        for group in _row_groups(world, impressions):
            tables = [pa.Table.from_batches(list(batches)) for batches in zip(*group, strict=True)]
            if not writers:
                writers = [pq.ParquetWriter(p, t.schema) for p, t in zip(paths, tables, strict=True)]
            for writer, table in zip(writers, tables, strict=True):
                writer.write_table(table, row_group_size=table.num_rows)
            for log, _ in group:
                tally.add({name: log.column(name).to_numpy() for name in _TALLIED})
            written += tables[0].num_rows
            on_progress(written)
    finally:
        for writer in writers:
            writer.close()


_TALLIED = ("user_id", "item_id", "event_time_ms", *TASK_NAMES)


def _row_groups(world: World, impressions: int) -> Iterator[list[tuple[Any, Any]]]:
    """The (log, truth) record batches of each Parquet row group."""
    group: list[tuple[Any, Any]] = []
    for log, truth in _chunks(world, impressions):
        group.append((pa.RecordBatch.from_pydict(log), pa.RecordBatch.from_pydict(truth)))
        if len(group) == ROW_GROUP_CHUNKS:
            yield group
            group = []
    if group:
        yield group


def _chunks(world: World, impressions: int) -> Iterator[tuple[Columns, Columns]]:
    """The columns of log and truth, chunk by chunk. A chunk depends only on (seed, chunk number) and its start time."""
    c = world.config
    rows = CHUNK_REQUESTS * c.candidates
    start_ms = float(c.start_ms)
    for chunk in range(-(-impressions // rows)):
        rng = np.random.default_rng([world.seed, 4, chunk])
        first = chunk * rows
        gaps_ms = rng.exponential(1000 * c.candidates / c.impressions_per_s, CHUNK_REQUESTS)
        request_ms = start_ms + np.cumsum(gaps_ms)
        start_ms = float(request_ms[-1])
        log, truth = _chunk(world, rng, first, request_ms)
        kept = min(rows, impressions - first)
        yield {k: v[:kept] for k, v in log.items()}, {k: v[:kept] for k, v in truth.items()}


def _chunk(world: World, rng: np.random.Generator, first: int, request_ms: F64) -> tuple[Columns, Columns]:
    c, requests = world.config, len(request_ms)
    activity = world.users.first(world.alive_users(first)).activity
    user = np.repeat(_draw(rng, activity, (requests,)), c.candidates)
    item = _draw_distinct(rng, world.exposure(first), (requests, c.candidates)).ravel()
    tab = np.repeat(rng.choice(4, requests, p=[0.7, 0.15, 0.1, 0.05]), c.candidates)
    device = np.repeat(rng.choice(3, requests, p=[0.6, 0.3, 0.1]), c.candidates)
    event_time_ms = np.repeat(np.rint(request_ms).astype(np.int64), c.candidates)
    time_s = (event_time_ms - c.start_ms) / 1000
    truth = world.probabilities(user, item, device, time_s)
    happened = _sample(rng, truth)
    users, items = world.users.first(int(user.max()) + 1), world.items.first(int(item.max()) + 1)
    impression_id = first + np.arange(len(user), dtype=np.int64)
    log: Columns = {
        "impression_id": impression_id,
        "request_id": impression_id // c.candidates,
        "event_time_ms": event_time_ms,
        "user_id": user,
        "item_id": item,
        "user_segment": users.shown_segment[user],
        "user_age_band": users.age_band[user],
        "user_country": pa.array(COUNTRIES).take(pa.array(users.country[user])),
        "user_interests": _lists(users.interests[user]),
        "item_category": items.category[item],
        "item_author": items.author[item],
        "item_tags": _lists(items.tags[item]),
        "item_duration_s": items.duration_s[item].astype(np.float32),
        "tab": tab,
        "device": device,
        **{task: happened[:, t].astype(np.int8) for t, task in enumerate(TASK_NAMES)},
        "watch_time_s": _watch_time_s(rng, happened, items.duration_s[item]),
    }
    return log, {
        "impression_id": impression_id,
        **{t: truth[:, k].astype(np.float32) for k, t in enumerate(TASK_NAMES)},
    }


def _sample(rng: np.random.Generator, truth: F64) -> Bool:
    """Draw outcomes with the given probabilities, bool [N, T]. A task's is positive only where its parent's is."""
    draws = rng.random(truth.shape)
    happened = np.empty(truth.shape, np.bool_)
    for t, task in enumerate(OUTCOME_TASKS):
        if task.parent is None:
            happened[:, t] = draws[:, t] < truth[:, t]
        else:
            parent = TASK_NAMES.index(task.parent)
            happened[:, t] = happened[:, parent] & (draws[:, t] * truth[:, parent] < truth[:, t])
    return happened


def _watch_time_s(rng: np.random.Generator, happened: Bool, duration_s: F64) -> F32:
    """Draw watch times [N]: below 0.3 of the duration without a click, above 0.7 for a long view, else in between."""
    click, long_view = (happened[:, TASK_NAMES.index(name)] for name in ("click", "long_view"))
    low = np.where(long_view, 0.7, np.where(click, 0.3, 0.02))
    high = np.where(long_view, 1.0, np.where(click, 0.7, 0.3))
    return (duration_s * (low + (high - low) * rng.random(len(low)))).astype(np.float32)


def _draw(rng: np.random.Generator, weights: F64, shape: tuple[int, ...]) -> I64:
    """Draw indices with probabilities proportional to their weights."""
    upto = np.cumsum(weights)
    drawn = np.searchsorted(upto, rng.random(shape) * upto[-1], side="right")
    indices: I64 = np.minimum(drawn, len(weights) - 1)
    return indices


def _draw_distinct(rng: np.random.Generator, weights: F64, shape: tuple[int, int]) -> I64:
    """Like :func:`_draw`, but entries of a row that occur twice are drawn again until all differ."""
    drawn = _draw(rng, weights, shape)
    while True:
        order = np.argsort(drawn, axis=1, kind="stable")
        ordered = np.take_along_axis(drawn, order, axis=1)
        again = np.zeros(shape, np.bool_)
        np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
        if not again.any():
            return drawn
        drawn[again] = _draw(rng, weights, (int(again.sum()),))


def _lists(values: I64) -> Any:
    """Make an Arrow array with one list per row. [N, L] → N lists."""
    n, length = values.shape
    return pa.ListArray.from_arrays(pa.array(np.arange(n + 1, dtype=np.int32) * length), pa.array(values.ravel()))
