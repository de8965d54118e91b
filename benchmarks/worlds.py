"""Synthetic worlds with requests, user segments and conflicting task groups, whose true probabilities are known.

A user u and an item i have K = 16 latent numbers each, ``v = a_u ⊙ b_i``. A *regime* is what decides how a task reads
``v``: a segment of the user, or a category of the item. The logit of task t is

``bias_t + 0.5·pop_i + 0.5·g(v; C_t) + 1.3·g(v; R_{t, regime})``, ``g(v; (M, w)) = w·tanh(Mᵀv)``

with M of 16 × 4, its entries and those of w normal, w of length 1. Positives fall from 45 % (task 0) to 5 % (task 7).
The model sees noisy a_u and b_i (deviation 0.3), their product, and the regimes. Each request shows one user 8 items.

The worlds were written down before any ranker was tried on them, and are not tuned.
Letters: N instances, T tasks, F features, R regimes, L latent numbers, H hidden ones, O outputs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from smes.events import ExampleBlock
from smes.schema import Feature, Schema, Task

NUM_TASKS = 8
CANDIDATES = 8
USERS, ITEMS, LATENT, HIDDEN = 20_000, 5_000, 16, 4
COMMON, REGIME, POPULARITY, NOISE = 0.5, 1.3, 0.5, 0.3
_CHUNK = 16_384  # instances generated at once

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class WorldSpec:
    """What tells one world from another.

    Attributes:
        segments: Regimes of users.
        categories: Regimes of items; 0 for none.
        by_category: Tasks whose regime is the item's category; the other tasks follow the user's segment.
        ids: Whether regimes are given as ids, beside the ids of user and item, with embedding tables to learn; else as
            indicators (0 or 1), one a regime.
        least_rate: Base rate of the last task. The rates fall geometrically from 0.45 to this.
        needs: Task → the task, itself without such a need, without whose positive label it is never positive. Its
            logit is then of its probability given that positive; its base rate is that of both.
    """

    segments: int
    categories: int = 0
    by_category: tuple[int, ...] = ()
    ids: bool = False
    least_rate: float = 0.05
    needs: Mapping[int, int] = field(default_factory=dict)

    @property
    def rates(self) -> tuple[float, ...]:
        """Base rate by task."""
        return tuple(np.geomspace(0.45, self.least_rate, NUM_TASKS).tolist())


WORLDS: dict[str, WorldSpec] = {
    "segments": WorldSpec(segments=64),
    "conflict": WorldSpec(segments=32, categories=32, by_category=(4, 5, 6, 7)),
    "tables": WorldSpec(segments=32, categories=32, by_category=(4, 5, 6, 7), ids=True),
}
"""``segments`` and ``conflict``: numbers only. ``tables``: the regimes of ``conflict`` behind ids."""


class World:
    """A stream of labelled instances and the probabilities that their labels were drawn with.

    Args:
        spec: Which world.
        seed: Of everything: users, items, regimes and the stream.
    """

    def __init__(self, spec: WorldSpec, seed: int) -> None:
        self._spec = spec
        self._seed = seed
        rng = np.random.default_rng([seed, 0])
        self._a_UL, self._b_IL = rng.normal(size=(USERS, LATENT)), rng.normal(size=(ITEMS, LATENT))
        self._seen_a_UL = self._a_UL + NOISE * rng.normal(size=self._a_UL.shape)
        self._seen_b_IL = self._b_IL + NOISE * rng.normal(size=self._b_IL.shape)
        self._segment_U = rng.integers(spec.segments, size=USERS)
        self._category_I = rng.integers(max(spec.categories, 1), size=ITEMS)
        self._popularity_I = rng.normal(size=ITEMS)
        self._draw_readings(rng)
        self._bias_T = np.zeros(NUM_TASKS)
        users, items = rng.integers(USERS, size=50_000), rng.integers(ITEMS, size=50_000)
        logits_NT = self._logits(users, items)
        needed_NT = np.ones_like(logits_NT)
        for t in sorted(range(NUM_TASKS), key=spec.needs.__contains__):  # first those that need no other
            if t in spec.needs:
                needed_NT[:, t] = _sigmoid(logits_NT[:, spec.needs[t]] + self._bias_T[spec.needs[t]])
            self._bias_T[t] = _bias(logits_NT[:, t], needed_NT[:, t], spec.rates[t])
        self.schema = _schema(spec)

    def stream(self, num_instances: int, batch_size: int) -> Iterator[tuple[ExampleBlock, F64]]:
        """Batches in the order of time, each with its true probabilities, float64 [N, T].

        Args:
            num_instances: How many in all; a multiple of ``CANDIDATES``.
            batch_size: Instances of a batch, a multiple of ``CANDIDATES``; the last may be smaller.
        """
        if num_instances % CANDIDATES or batch_size % CANDIDATES or _CHUNK % batch_size:
            raise ValueError(
                f"num_instances {num_instances}, batch_size {batch_size}: expected multiples of {CANDIDATES}, "
                f"the second a divisor of {_CHUNK}"
            )
        for number, start in enumerate(range(0, num_instances, _CHUNK)):
            examples, probabilities_NT = self._chunk(number, start, min(_CHUNK, num_instances - start))
            for first in range(0, len(examples), batch_size):
                rows = np.arange(first, min(first + batch_size, len(examples)))
                yield examples.take(rows), probabilities_NT[rows]

    def _chunk(self, number: int, start: int, count: int) -> tuple[ExampleBlock, F64]:
        rng = np.random.default_rng([self._seed, 1, number])
        users = np.repeat(rng.integers(USERS, size=count // CANDIDATES), CANDIDATES)
        items = rng.integers(ITEMS, size=count)
        probabilities_NT = _sigmoid(self._logits(users, items))
        examples = ExampleBlock.empty(self.schema, count)
        examples.impression_id[:] = np.arange(start, start + count)
        examples.request_id[:] = examples.impression_id // CANDIDATES
        examples.event_time_ms[:] = examples.request_id * 100
        a_NL, b_NL = self._seen_a_UL[users], self._seen_b_IL[items]
        examples.numerics[:, : 3 * LATENT] = np.concatenate([a_NL, b_NL, a_NL * b_NL], axis=1)
        examples.labels[:] = rng.random(probabilities_NT.shape) < probabilities_NT
        for task, needed in self._spec.needs.items():
            examples.labels[:, task] *= examples.labels[:, needed]
            probabilities_NT[:, task] *= probabilities_NT[:, needed]
        self._give_regimes(examples, users, items)
        return examples, probabilities_NT

    def _give_regimes(self, examples: ExampleBlock, users: I64, items: I64) -> None:
        spec, rows = self._spec, np.arange(len(users))
        segment, category = self._segment_U[users], self._category_I[items]
        if spec.ids:
            examples.ids[:] = np.stack([users, items, segment, category], axis=1)
            return
        examples.numerics[:, 3 * LATENT :] = 0
        examples.numerics[rows, 3 * LATENT + segment] = 1
        if spec.categories:
            examples.numerics[rows, 3 * LATENT + spec.segments + category] = 1

    def _logits(self, users: I64, items: I64) -> F64:
        v_NL = self._a_UL[users] * self._b_IL[items]
        read_NT = self._read(v_NL, self._segment_U[users], self._category_I[items])
        return read_NT + POPULARITY * self._popularity_I[items][:, None] + self._bias_T

    def _draw_readings(self, rng: np.random.Generator) -> None:
        """What the tasks see in v: here, each has readers of its own."""
        spec = self._spec
        self._common = [Reader.draw(rng, 1) for _ in range(NUM_TASKS)]
        counts = [spec.categories if t in spec.by_category else spec.segments for t in range(NUM_TASKS)]
        self._regimes = [Reader.draw(rng, count) for count in counts]

    def _read(self, v_NL: F64, segment_N: I64, category_N: I64) -> F64:
        """Logits without popularity and bias [N, T]."""
        nothing_N = np.zeros(len(v_NL), np.int64)
        read_NT = np.empty((len(v_NL), NUM_TASKS))
        for t in range(NUM_TASKS):
            regime_N = category_N if t in self._spec.by_category else segment_N
            read_NT[:, t] = REGIME * self._regimes[t](v_NL, regime_N) + COMMON * self._common[t](v_NL, nothing_N)
        return read_NT


class Reader:
    """How v is read in each of R regimes: ``tanh(Mᵀv)·w``, scaled so that a w of length 1 gives a deviation near 1.

    Args:
        m_RLH: M of each regime.
        w_RHO: w of each regime: [R, H], or [R, H, O] for O tasks that share M.
    """

    def __init__(self, m_RLH: F64, w_RHO: F64) -> None:
        self._m_RLH, self._w_RHO = m_RLH, w_RHO / 0.63  # tanh of a normal deviates by 0.63

    @classmethod
    def draw(cls, rng: np.random.Generator, regimes: int) -> "Reader":
        """For one task."""
        m_RLH = draw_m(rng, regimes, HIDDEN)
        w_RH = rng.normal(size=(regimes, HIDDEN))
        return cls(m_RLH, w_RH / np.linalg.norm(w_RH, axis=1, keepdims=True))

    def __call__(self, v_NL: F64, regime_N: I64) -> F64:
        """[N] or [N, O]."""
        out_NO = np.empty((len(v_NL), *self._w_RHO.shape[2:]))
        for regime in range(len(self._m_RLH)):
            rows = np.flatnonzero(regime_N == regime)
            out_NO[rows] = np.tanh(v_NL[rows] @ self._m_RLH[regime]) @ self._w_RHO[regime]
        return out_NO


def draw_m(rng: np.random.Generator, regimes: int, hidden: int) -> F64:
    """M of each regime, [R, L, H]."""
    m_RLH: F64 = rng.normal(size=(regimes, LATENT, hidden)) / np.sqrt(LATENT)
    return m_RLH


def _bias(logits_N: F64, needed_N: F64, rate: float) -> float:
    """The constant that makes the mean probability, times that of what is needed, ``rate``; by bisection."""
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.mean(needed_N * _sigmoid(logits_N + middle)) < rate else (low, middle)
    return low


def _sigmoid(logits: F64) -> F64:
    p: F64 = 1 / (1 + np.exp(-logits))
    return p


def _schema(spec: WorldSpec) -> Schema:
    names = [f"{part}{k}" for part in ("a", "b", "ab") for k in range(LATENT)]
    if spec.ids:
        ids = (Feature("segment", source="user"), Feature("category", source="item"))
    else:
        # Nothing to learn from ids here: one column each, always missing.
        ids = (Feature("user_id", source="user", dim=1), Feature("item_id", source="item", dim=1))
        names += [f"segment{k}" for k in range(spec.segments)] + [f"category{k}" for k in range(spec.categories)]
    numerics = tuple(Feature(name, kind="numeric", indicator=False) for name in names)
    return Schema("world", tuple(Task(f"task{t}") for t in range(NUM_TASKS)), (*ids, *numerics))
