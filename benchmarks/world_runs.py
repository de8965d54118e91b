"""One ranker with one seed through one synthetic world, scored before it is trained; and the world's own truth.

Letters: N instances, T tasks, P points of a learning curve.
"""

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.bootstrap import GroupedAuc
from benchmarks.flops import FlopTally, cost_of
from benchmarks.quality_config import Settings, build_config, key_of
from benchmarks.rare_worlds import RARE_WORLDS, RareWorld
from benchmarks.run_cache import RunCache, RunResult
from benchmarks.worlds import CANDIDATES, NUM_TASKS, WORLDS, World
from smes.arrays import F32, I64
from smes.events import ExampleBlock
from smes.model.learner import Learner
from smes.model.serving import ServingModel
from trainer.task_figures import RARE_BELOW

BATCH = 1024
MOST_POINTS, MOST_RARE_POINTS = 64, 16
_LEAST_BATCHES = 16
PARTS = {"tenth": (0.075, 0.125), "third": (0.3083, 0.3583), "end": (0.75, 1.0)}
"""Shares of the stream: around a tenth of it, around a third, and the last quarter."""
RARE_PARTS = {"tenth": (0.05, 0.15), "third": (0.28, 0.38), "end": (0.75, 1.0)}
"""The same where tasks are rare: wider, so that they have positives in each."""

_COUNTED_BATCHES = 8


@dataclass(frozen=True)
class Stream:
    """Which stream: a world, the seed of everything in it, and how many impressions."""

    world: str
    world_seed: int
    impressions: int

    def __post_init__(self) -> None:
        if self.world not in WORLDS and self.world not in RARE_WORLDS:
            raise ValueError(f"world {self.world!r}: expected one of {[*WORLDS, *RARE_WORLDS]}")
        if self.impressions < _LEAST_BATCHES * BATCH or self.impressions % BATCH:
            raise ValueError(
                f"impressions {self.impressions}: expected a multiple of {BATCH}, at least {_LEAST_BATCHES * BATCH}"
            )

    @property
    def curve_points(self) -> int:
        """P, the points of a learning curve: equal parts of the stream, of at least one batch each."""
        return min(MOST_RARE_POINTS if self.is_rare else MOST_POINTS, self.impressions // BATCH)

    @property
    def is_rare(self) -> bool:
        """Whether it is of a world with rare tasks."""
        return self.world in RARE_WORLDS

    @property
    def rare_tasks(self) -> list[int]:
        """Tasks with a base rate below ``RARE_BELOW``."""
        return [t for t, rate in enumerate(self.rates) if rate < RARE_BELOW]

    @property
    def rates(self) -> tuple[float, ...]:
        """Base rate by task."""
        return (WORLDS | RARE_WORLDS)[self.world].rates

    def make_world(self) -> World:
        """The world, made anew."""
        if self.is_rare:
            return RareWorld(RARE_WORLDS[self.world], self.world_seed)
        return World(WORLDS[self.world], self.world_seed)

    def rows(self, part: str) -> tuple[int, int]:
        """The first row of a part and the row after its last, of whole requests."""
        parts = RARE_PARTS if self.is_rare else PARTS
        first, last = (round(share * self.impressions) // CANDIDATES * CANDIDATES for share in parts[part])
        return first, last


class _Columns:
    """Columns of the stream, kept for its parts; and GAUC along the way."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._parts: dict[str, dict[str, list[NDArray[Any]]]] = {name: {} for name in PARTS}
        self._curve_P2T = np.zeros((stream.curve_points, 2, NUM_TASKS))

    def add(self, examples: ExampleBlock, scores_NT: F32, **columns: NDArray[Any]) -> None:
        """A batch of whole requests; columns of N rows are kept under their names."""
        position_N = examples.impression_id
        for name in PARTS:
            first, last = self._stream.rows(name)
            inside = slice(*np.searchsorted(position_N, [first, last]).tolist())
            for column, values in columns.items():
                self._parts[name].setdefault(column, []).append(values[inside])
        grouped = GroupedAuc.of(examples.request_id, position_N, scores_NT, examples.labels)
        point = int(position_N[0]) * self._stream.curve_points // self._stream.impressions
        self._curve_P2T[point, 0] += (grouped.auc_GT * grouped.weight_GT).sum(axis=0)
        self._curve_P2T[point, 1] += grouped.weight_GT.sum(axis=0)

    def arrays(self) -> dict[str, NDArray[Any]]:
        kept = {f"{c}_{s}": np.concatenate(parts) for s, columns in self._parts.items() for c, parts in columns.items()}
        return {**kept, "curve_P2T": self._curve_P2T}


@dataclass(frozen=True)
class TruthRun:
    """Labels, true probabilities and users of the parts; the curve is the oracle's."""

    stream: Stream

    @property
    def title(self) -> str:
        return f"{self.stream.world}: truth"

    @property
    def key(self) -> str:
        return f"truth-{self.stream.world}-{self.stream.world_seed}-{self.stream.impressions}"

    def execute(self, cache: RunCache) -> RunResult:
        columns = _Columns(self.stream)
        for examples, probabilities_NT in self.stream.make_world().stream(self.stream.impressions, BATCH):
            truth_NT = probabilities_NT.astype(np.float32)
            columns.add(
                examples,
                truth_NT,
                truth=truth_NT,
                labels=examples.labels.astype(np.uint8),
                user=_user(examples),
                request=examples.request_id,
            )
        return RunResult(columns.arrays(), {})


@dataclass(frozen=True)
class WorldRun:
    """One ranker with one seed.

    Attributes:
        ranker: Its name in the comparison.
        settings: Its settings, dotted.
        stream: Which stream.
        seed: Of its first weights.
    """

    ranker: str
    settings: Settings
    stream: Stream
    seed: int

    @property
    def title(self) -> str:
        return f"{self.stream.world}: {self.ranker}, seed {self.seed}"

    @property
    def key(self) -> str:
        config = build_config(self.settings, self.ranker)
        return f"{self.ranker}-{self.stream.world}-{self.seed}-{key_of(config, **asdict(self.stream), seed=self.seed)}"

    def execute(self, cache: RunCache) -> RunResult:
        config = build_config(self.settings, self.ranker)
        world = self.stream.make_world()
        cpu = torch.device("cpu")
        learner = Learner(world.schema, config.model, config.optimizer, device=cpu, seed=self.seed)
        columns = _Columns(self.stream)
        active: list[float] = []
        last: list[ExampleBlock] = []
        seconds = 0.0
        for examples, _ in world.stream(self.stream.impressions, BATCH):
            started_s = time.perf_counter()
            result = learner.step(learner.prepare(examples))
            scores_NT: F32 = result.scores.numpy()
            seconds += time.perf_counter() - started_s
            columns.add(examples, scores_NT, scores=scores_NT)
            if result.active_experts is not None and examples.impression_id[0] >= self.stream.rows("end")[0]:
                active.append(float(result.active_experts.float().mean()))
            last = [*last[-_COUNTED_BATCHES + 1 :], examples]
        tally = FlopTally()
        model = ServingModel.from_state(world.schema, config.model, learner.serving_state())
        for examples in last:
            with tally.counting(len(examples)):
                model.score(examples.ids, examples.numerics, requests=np.arange(len(examples)))
        mean_active = float(np.mean(active)) if active else None
        cost = cost_of(world.schema, config.model, tally, mean_active)
        facts = {**asdict(cost), "flops": cost.flops, "active_experts": mean_active, "seconds": seconds}
        return RunResult(columns.arrays(), facts)


def _user(examples: ExampleBlock) -> I64:
    """Who the user is: where a world gives no ids, the two first of the numbers that all their requests carry."""
    return np.ascontiguousarray(examples.numerics[:, :2]).view(np.int64).ravel()
