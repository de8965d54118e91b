"""Synthetic worlds with requests, user segments and conflicting task groups, whose true probabilities are known.

A user u and an item i have K = 16 latent numbers each, ``v = a_u ⊙ b_i``. A *regime* is what decides how a task reads
``v``: a segment of the user, or a category of the item. The logit of task t is

``bias_t + 0.5·pop_i + 0.5·g(v; C_t) + 1.3·g(v; R_{t, regime})``, ``g(v; (M, w)) = w·tanh(Mᵀv)``

with M of 16 × 4, its entries and those of w normal, w of length 1. Positives fall from 45 % (task 0) to 5 % (task 7).
The model sees noisy a_u and b_i (deviation 0.3), their product, and the regimes. Each request shows one user 8 items.

The worlds were written down before any ranker was tried on them, and are not tuned.
Letters: N instances, T tasks, F features.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smes.events import ExampleBlock
from smes.schema import Feature, Schema, Task

NUM_TASKS = 8
CANDIDATES = 8
USERS, ITEMS, LATENT, HIDDEN = 20_000, 5_000, 16, 4
BASE_RATES = np.geomspace(0.45, 0.05, NUM_TASKS)
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
    """

    segments: int
    categories: int = 0
    by_category: tuple[int, ...] = ()
    ids: bool = False


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
        self._common = [_Reader(rng, 1) for _ in range(NUM_TASKS)]
        counts = [spec.categories if t in spec.by_category else spec.segments for t in range(NUM_TASKS)]
        self._regimes = [_Reader(rng, count) for count in counts]
        self._bias_T = np.zeros(NUM_TASKS)
        users, items = rng.integers(USERS, size=50_000), rng.integers(ITEMS, size=50_000)
        logits_NT = self._logits(users, items)
        self._bias_T = np.array([_bias(logits_NT[:, t], rate) for t, rate in enumerate(BASE_RATES)])
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
        probabilities_NT = 1 / (1 + np.exp(-self._logits(users, items)))
        examples = ExampleBlock.empty(self.schema, count)
        examples.impression_id[:] = np.arange(start, start + count)
        examples.request_id[:] = examples.impression_id // CANDIDATES
        examples.event_time_ms[:] = examples.request_id * 100
        a_NL, b_NL = self._seen_a_UL[users], self._seen_b_IL[items]
        examples.numerics[:, : 3 * LATENT] = np.concatenate([a_NL, b_NL, a_NL * b_NL], axis=1)
        examples.labels[:] = rng.random(probabilities_NT.shape) < probabilities_NT
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
        segment, category = self._segment_U[users], self._category_I[items]
        nothing = np.zeros(len(users), np.int64)
        logits_NT = np.empty((len(users), NUM_TASKS))
        for t in range(NUM_TASKS):
            regime = category if t in self._spec.by_category else segment
            own, common = self._regimes[t](v_NL, regime), self._common[t](v_NL, nothing)
            logits_NT[:, t] = REGIME * own + COMMON * common + POPULARITY * self._popularity_I[items]
        return logits_NT + self._bias_T


class _Reader:
    """How one task reads v in each regime: ``w·tanh(Mᵀv)``, scaled to a deviation near 1."""

    def __init__(self, rng: np.random.Generator, count: int) -> None:
        self._m_RLH = rng.normal(size=(count, LATENT, HIDDEN)) / np.sqrt(LATENT)
        w_RH = rng.normal(size=(count, HIDDEN))
        self._w_RH = w_RH / np.linalg.norm(w_RH, axis=1, keepdims=True) / 0.63  # tanh of a normal deviates by 0.63

    def __call__(self, v_NL: F64, regime_N: I64) -> F64:
        out_N = np.empty(len(v_NL))
        for regime in range(len(self._m_RLH)):
            rows = np.flatnonzero(regime_N == regime)
            out_N[rows] = np.tanh(v_NL[rows] @ self._m_RLH[regime]) @ self._w_RH[regime]
        return out_N


def _bias(logits_N: F64, rate: float) -> float:
    """The constant that makes the mean probability ``rate``, by bisection."""
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.mean(1 / (1 + np.exp(-logits_N - middle))) < rate else (low, middle)
    return low


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
