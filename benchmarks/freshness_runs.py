"""What fresh weights are worth: one pass over a log, every example scored by weights of several ages.

One learner trains on the log once, in the order of event time. Beside it stand copies of its weights. One is *replaced
every* so many seconds of event time: it answers with the weights of the last full period, so they are half a period old
on average and a period at most. One is never replaced after the warm-up, and one with every mini-batch, just before the
step on it: those weights are as old as a mini-batch, :data:`CUT_S` of event time at most. All copies score the same
examples, as a scorer does (an id that they do not know reads its vocabulary's default row), and no example was seen by
the weights that score it.

What is left out on purpose: labels are known at once. So it is the age of the weights alone that differs, not what the
join waits for. Features are fresh for all: only the weights age.

Letters: N examples after the warm-up, T binary tasks, A ages, B examples of a batch.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.quality_config import key_of
from benchmarks.run_cache import RunCache, RunResult
from simulators.logs.reader import open_log
from simulators.merge import replay_blocks
from simulators.synthetic import synthesize
from simulators.world import WorldConfig
from smes.arrays import F32, I64, Bool, under
from smes.events import ExampleBlock
from smes.model.frozen import FrozenWeights
from smes.model.learner import Learner
from smes.model.serving import ServingModel
from smes.schema import Schema
from smes_cli.building import build_learner
from smes_cli.config import Config
from stream.block_stream import BlockStream
from stream.config import MiniBatchConfig

AGES: dict[str, float] = {"never": np.inf, "1 day": 86_400, "1 h": 3600, "10 min": 600, "1 min": 60, "every cut": 0}
"""Name → seconds of event time after which the weights that answer are replaced; 0: with every mini-batch."""

CUT_S = {"KuaiRand": 30.0, "drifting world": 10.0}
"""Log → seconds of event time in a mini-batch. KuaiRand has an impression every 5 s, the drifting world two a second.
"""

DRIFTING = WorldConfig(impressions_per_s=2.0, shortest_drift_s=7200, longest_drift_s=86_400, new_item_s=10_800)
"""A world slow enough to pass days: tastes and exposure drift in periods of 2 to 24 h, new items are shown more often
for some 3 h. It was written down before anything was trained in it."""

DRIFTING_DAYS, DRIFTING_WARM_UP_DAYS, KUAIRAND_WARM_UP_DAYS = 4.0, 1.0, 3.0
_DAY_S = 86_400.0
_MOST_WAITING = 4096  # examples that a copy scores at once


@dataclass(frozen=True)
class ValueRun:
    """One learner with one seed.

    Attributes:
        log: A KuaiRand folder; None for the drifting world, which is another one for each seed.
        seed: Of the first weights, and of the world.
        warm_up_days: Days of event time before anything is scored.
        impressions: Only the first so many; None for all of KuaiRand.
    """

    log: Path | None
    seed: int
    warm_up_days: float
    impressions: int | None

    @property
    def name(self) -> str:
        """Of the log, for people."""
        return "KuaiRand" if self.log else "drifting world"

    @property
    def title(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def stream(self) -> str:
        """The same for runs that see the same examples."""
        return "kuairand" if self.log else f"world-{self.seed}"

    @property
    def key(self) -> str:
        world = asdict(DRIFTING) if self.log is None else {}
        files = sorted((path.name, path.stat().st_size) for path in self.log.rglob("*.csv")) if self.log else []
        facts = {"ages": list(AGES), "files": files, "limit": self.impressions, "warm_up": self.warm_up_days, **world}
        return f"value-{self.stream}-{self.seed}-{key_of(self.config, **facts, seed=self.seed)}"

    @property
    def config(self) -> Config:
        config = Config(schema="kuairand" if self.log else "synthetic")
        batch = MiniBatchConfig(size=64, max_age_s=CUT_S[self.name], max_wait_s=None)
        return replace(
            config,
            stream=replace(config.stream, batch=batch),
            trainer=replace(config.trainer, seed=self.seed, device="cpu"),
        )

    def execute(self, cache: RunCache) -> RunResult:
        """Scores float32 [A, N, T], labels and masks [N, T], users [N]."""
        started_s = time.monotonic()
        schema = self.config.schema_file().schema
        scored = _AgedScores(build_learner(self.config, schema), round(1000 * self.warm_up_days * _DAY_S))
        with self._log() as log:
            for examples in _batches(self.config, log, self.impressions):
                scored.step(examples)
        arrays = scored.arrays()
        facts = {
            "tasks": [schema.tasks[t].name for t in binary_tasks(schema)],
            "replaced": scored.replaced(),
            "days": scored.days,
            "seconds": time.monotonic() - started_s,
        }
        return RunResult(arrays, facts)

    @contextmanager
    def _log(self) -> Iterator[Path]:
        if self.log is not None:
            yield self.log
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "world.parquet"
            assert self.impressions is not None
            synthesize(path, self.impressions, self.seed, config=DRIFTING)
            yield path


def value_runs(kuairand: Path | None, seeds: int, share: float) -> list[ValueRun]:
    """Runs of the drifting world, and of KuaiRand where there is a folder.

    Args:
        kuairand: The folder.
        seeds: How many of each.
        share: Of the drifting world's days and of both warm-ups, to try the benchmark; 1 for figures to quote.
    """
    impressions = round(share * DRIFTING_DAYS * _DAY_S * DRIFTING.impressions_per_s)
    runs = [ValueRun(None, seed, share * DRIFTING_WARM_UP_DAYS, impressions) for seed in range(seeds)]
    if kuairand is not None:
        limit = None if share == 1 else round(share * 180_000)
        runs += [ValueRun(kuairand, seed, share * KUAIRAND_WARM_UP_DAYS, limit) for seed in range(seeds)]
    return runs


def binary_tasks(schema: Schema) -> list[int]:
    """Numbers of the binary tasks: the T of this module."""
    return [t for t, task in enumerate(schema.tasks) if task.kind == "binary"]


class _Refillable(ServingModel):
    """A serving model whose weights are replaced in place: building one takes longer than a step."""

    def refill(self, weights: FrozenWeights) -> None:
        """Take other weights of the same model."""
        self._model.load_state_dict(under("dense.", weights.dense))
        self._rows = weights.rows


class _Copy:
    """Weights that are replaced every so many milliseconds of event time; infinite: never; 0: with every batch.

    A copy that is there scores examples later, many at once: its weights stay what they were.
    """

    def __init__(self, learner: Learner, every_ms: float, tasks: Sequence[int]) -> None:
        self._learner, self._every_ms, self._tasks = learner, every_ms, tasks
        self._weights: FrozenWeights | None = None
        self._model: _Refillable | None = None
        self._period: float | None = None
        self._waiting: list[ExampleBlock] = []
        self._scores: list[F32] = []
        self.replaced = 0

    def before_step(self, examples: ExampleBlock, since_ms: int) -> None:
        """Take a batch that begins so long after the warm-up."""
        period = since_ms // self._every_ms if self._every_ms else None
        if period is None or period != self._period:
            self._score()
            self._replace()
            self._period = period
        self._waiting.append(examples)
        if sum(map(len, self._waiting)) >= _MOST_WAITING:
            self._score()

    def scores(self) -> F32:
        """float32 [N, T] of everything taken."""
        self._score()
        return np.concatenate(self._scores)

    def _replace(self) -> None:
        if self._weights is not None:
            self._weights.close()
        self._weights = weights = self._learner.freeze()
        if self._model is None:
            self._model = _Refillable(self._learner.schema, self._learner.config, weights.dense, weights.rows)
        self._model.refill(weights)
        self.replaced += 1

    def _score(self) -> None:
        if self._waiting and self._model is not None:
            examples = ExampleBlock.concat(self._waiting)
            self._scores.append(self._model.score(examples.ids, examples.numerics)[:, self._tasks])
            self._waiting = []


class _AgedScores:
    """A learner and the copies of its weights, batch by batch.

    Args:
        learner: Trains on every batch.
        warm_up_ms: Event time from the first example to the first that is scored.
    """

    def __init__(self, learner: Learner, warm_up_ms: int) -> None:
        self._learner, self._warm_up_ms = learner, warm_up_ms
        self._tasks = binary_tasks(learner.schema)
        self._copies = {name: _Copy(learner, 1000 * seconds, self._tasks) for name, seconds in AGES.items()}
        self._labels: list[F32] = []
        self._mask: list[Bool] = []
        self._user: list[I64] = []
        self._first_ms: int | None = None
        self.days = 0.0
        """Days of event time that were scored."""

    def step(self, examples: ExampleBlock) -> None:
        """Score a batch if the warm-up is over, then train on it."""
        begin_ms = int(examples.event_time_ms[0])
        self._first_ms = begin_ms if self._first_ms is None else self._first_ms
        since_ms = begin_ms - self._first_ms - self._warm_up_ms
        if since_ms >= 0:
            for copy in self._copies.values():
                copy.before_step(examples, since_ms)
        self._learner.step(self._learner.prepare(examples))
        if since_ms >= 0:
            self._labels.append(examples.labels[:, self._tasks])
            self._mask.append(examples.label_mask[:, self._tasks])
            self._user.append(examples.user_id)
            self.days = since_ms / 1000 / _DAY_S

    def arrays(self) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
        """Scores [A, N, T] in the order of :data:`AGES`, labels and masks [N, T], users [N]."""
        return {
            "scores": np.stack([copy.scores() for copy in self._copies.values()]),
            "labels": np.concatenate(self._labels).astype(np.uint8),
            "mask": np.concatenate(self._mask),
            "user": np.concatenate(self._user),
        }

    def replaced(self) -> dict[str, int]:
        """Age → how often its weights were replaced."""
        return {name: copy.replaced for name, copy in self._copies.items()}


def _batches(config: Config, log: Path, limit: int | None) -> Iterator[ExampleBlock]:
    schema_file = config.schema_file()
    with open_log(log, schema_file, limit=limit) as reader:
        stream = BlockStream(schema_file.schema, config.stream.join, config.stream.batch, replay_blocks(reader, 0))
        while not stream.ended:
            stream.poll(0)
            while (batch := stream.next_batch()) is not None:
                yield batch
