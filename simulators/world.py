"""A simulated world of users and items with latent tastes, in which the probability of every outcome is known.

A log shows only categorical, noisy features of the entities (segment, interests, category, tags, author …), never the
latent vectors. The world has properties that call for a non-linear, sparse, *online* model:

- The taste of user u for item i is ``w[s,t] · tanh(V[s,t] (a_u ⊙ b_i))``, with maps w and V for each user segment s and
  task t. A sum of weights per feature cannot express it.
- Each segment's liking for each category drifts, and so does each category's exposure.
- New users and items keep appearing. New items are shown more often than their popularity suggests.

Entities are made in blocks. A block depends only on (seed, kind, block number), so an entity is the same however long
the log is.

Letters: N impressions, U users, I items, D latent dimensions, S segments, C categories, T binary tasks.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, TypeVar

import numpy as np

from smes.arrays import F64, I64

COUNTRIES = ("br", "cn", "de", "fr", "id", "in", "jp", "mx", "ng", "us")
AUTHORS_PER_CATEGORY = 40
TAGS_PER_ITEM = 3
INTERESTS_PER_USER = 3
HIDDEN = 4
ENTITY_BLOCK = 1024
NEW_ITEM_BOOST = 4.0


@dataclass(frozen=True)
class OutcomeTask:
    """A binary task of the world.

    Attributes:
        name: Name of the task.
        parent: The outcome can only be positive if this task's is; None for no condition.
        rate: Share of positive outcomes among all impressions at the start of the world.
    """

    name: str
    parent: str | None
    rate: float


OUTCOME_TASKS = (
    OutcomeTask("click", None, 0.35),
    OutcomeTask("long_view", "click", 0.20),
    OutcomeTask("like", "click", 0.03),
    OutcomeTask("profile_enter", "click", 0.03),
    OutcomeTask("comment", "long_view", 0.006),
    OutcomeTask("follow", "profile_enter", 0.005),
    OutcomeTask("forward", "long_view", 0.002),
)
TASK_NAMES = tuple(task.name for task in OUTCOME_TASKS)


@dataclass(frozen=True)
class WorldConfig:
    """Size and pace of the world.

    Attributes:
        users, items: How many there are at the start.
        impressions_per_new_user, impressions_per_new_item: How many impressions pass until one more appears.
        impressions_per_s: Mean number of impressions per second of event time.
        candidates: How many items a request shows.
        latent_dim: D.
        segments: S.
        categories: C.
        start_ms: Time of the first request, Unix milliseconds.
        shortest_drift_s, longest_drift_s: The liking of each segment for each category and the exposure of each
            category rise and fall in periods between these, each in its own.
        new_item_s: How long a new item is shown more often than its popularity suggests: the boost decays with this
            time constant.
    """

    users: int = 5000
    items: int = 2000
    impressions_per_new_user: int = 400
    impressions_per_new_item: int = 200
    impressions_per_s: float = 200.0
    candidates: int = 8
    latent_dim: int = 8
    segments: int = 12
    categories: int = 24
    start_ms: int = 1_704_067_200_000
    shortest_drift_s: float = 600.0
    longest_drift_s: float = 3600.0
    new_item_s: float = 120.0


@dataclass(frozen=True)
class Users:
    """Users, in the order of their ids. ``latent`` is float64 [U, D], ``interests`` int64 [U, 3], all others [U]."""

    segment: I64
    latent: F64
    propensity: F64
    activity: F64
    shown_segment: I64
    age_band: I64
    country: I64
    interests: I64


@dataclass(frozen=True)
class Items:
    """Items, in the order of their ids. ``latent`` is float64 [I, D], ``tags`` int64 [I, 3], all others [I]."""

    category: I64
    latent: F64
    quality: F64
    popularity: F64
    author: I64
    tags: I64
    duration_s: F64


E = TypeVar("E", bound=Users | Items)


class World:
    """The growing population, and the probabilities of exposure and outcomes.

    Args:
        seed: Seed of all random draws.
        config: Size and pace.
    """

    def __init__(self, seed: int, config: WorldConfig | None = None) -> None:
        self.seed = seed
        self.config = config or WorldConfig()
        c = self.config
        rng = np.random.default_rng([seed, 0])
        self._segment_centre = rng.normal(0, 1, (c.segments, c.latent_dim))
        self._category_centre = rng.normal(0, 1, (c.categories, c.latent_dim))
        self._author_quality = rng.normal(0, 0.4, c.categories * AUTHORS_PER_CATEGORY)
        shape = (len(TASK_NAMES), c.segments)
        self._maps = rng.normal(0, 1.2 / np.sqrt(HIDDEN), (*shape, HIDDEN, c.latent_dim))
        self._weights = rng.normal(0, 1.3, (*shape, HIDDEN))
        self._device_effect = rng.normal(0, 0.25, (len(TASK_NAMES), 3))
        drift_s = c.shortest_drift_s, c.longest_drift_s
        self._taste_period_s = rng.uniform(*drift_s, (c.segments, c.categories))
        self._taste_phase = rng.uniform(0, 2 * np.pi, (c.segments, c.categories))
        self._exposure_period_s = rng.uniform(*drift_s, c.categories)
        self._exposure_phase = rng.uniform(0, 2 * np.pi, c.categories)
        self.users = Population(self._make_users, c.users)
        self.items = Population(self._make_items, c.items)
        self._bias = self._find_bias()

    def alive_users(self, impression: int) -> int:
        """How many users there are at the time of an impression, given by its number."""
        return self.config.users + impression // self.config.impressions_per_new_user

    def alive_items(self, impression: int) -> int:
        """How many items there are at the time of an impression, given by its number."""
        return self.config.items + impression // self.config.impressions_per_new_item

    def exposure(self, impression: int) -> F64:
        """Weight with which each item is shown at the time of an impression, float64 [I].

        It is the product of the item's popularity, the trend of its category and its novelty.
        """
        c, alive = self.config, self.alive_items(impression)
        items = self.items.first(alive)
        born = np.maximum(np.arange(alive) - c.items, -1) * c.impressions_per_new_item
        age_s = np.where(born < 0, np.inf, (impression - born) / c.impressions_per_s)
        time_s = impression / c.impressions_per_s
        trend = np.exp(0.7 * np.sin(2 * np.pi * time_s / self._exposure_period_s + self._exposure_phase))
        novelty = 1 + NEW_ITEM_BOOST * np.exp(-age_s / c.new_item_s)
        weights: F64 = items.popularity * trend[items.category] * novelty
        return weights

    def probabilities(self, user: I64, item: I64, device: I64, time_s: F64) -> F64:
        """True probability of a positive outcome for each impression and task. float64 [N, T]."""
        conditional = _sigmoid(self._logits(user, item, device, time_s) + self._bias)
        return _chain(conditional)

    def _logits(self, user: I64, item: I64, device: I64, time_s: F64) -> F64:
        users, items = self.users.first(int(user.max()) + 1), self.items.first(int(item.max()) + 1)
        segment, category = users.segment[user], items.category[item]
        match = users.latent[user] * items.latent[item]
        drift = np.sin(
            2 * np.pi * time_s / self._taste_period_s[segment, category] + self._taste_phase[segment, category]
        )
        base = users.propensity[user] + items.quality[item] + 0.7 * drift
        logits = np.empty((len(user), len(TASK_NAMES)))
        for t in range(len(TASK_NAMES)):
            hidden = np.tanh(np.einsum("nhd,nd->nh", self._maps[t][segment], match))
            taste = np.einsum("nh,nh->n", self._weights[t][segment], hidden)
            logits[:, t] = taste + base * (1.0 if t == 0 else 0.5) + self._device_effect[t, device]
        return logits

    def _find_bias(self) -> F64:
        """Find the biases with which each task has its rate at the start of the world, by bisection. float64 [T]."""
        rng = np.random.default_rng([self.seed, 3])
        n = 20_000
        user = rng.choice(self.config.users, n, p=_normalised(self.users.first(self.config.users).activity))
        item = rng.choice(self.config.items, n, p=_normalised(self.exposure(0)))
        logits = self._logits(user, item, rng.integers(0, 3, n), np.zeros(n))
        bias = np.zeros(len(TASK_NAMES))
        for t, task in enumerate(OUTCOME_TASKS):
            low, high = -20.0, 20.0
            for _ in range(40):
                bias[t] = (low + high) / 2
                mean = _chain(_sigmoid(logits + bias))[:, t].mean()
                low, high = (bias[t], high) if mean < task.rate else (low, bias[t])
        return bias

    def _make_users(self, block: int) -> Users:
        c, n = self.config, ENTITY_BLOCK
        rng = np.random.default_rng([self.seed, 1, block])
        segment = rng.choice(c.segments, n, p=_normalised(1 / np.arange(2, c.segments + 2)))
        latent = self._segment_centre[segment] + rng.normal(0, 0.5, (n, c.latent_dim))
        affinity = latent @ self._category_centre.T + rng.normal(0, 1.0, (n, c.categories))
        return Users(
            segment=segment,
            latent=latent,
            propensity=rng.normal(0, 0.4, n),
            activity=rng.lognormal(0, 1.0, n),
            shown_segment=np.where(rng.random(n) < 0.9, segment, rng.integers(0, c.segments, n)),
            age_band=np.clip(segment // 2 + rng.integers(-1, 2, n), 0, None),
            country=(segment * 3 + rng.geometric(0.4, n) - 1) % len(COUNTRIES),
            interests=np.argsort(-affinity, axis=1)[:, :INTERESTS_PER_USER],
        )

    def _make_items(self, block: int) -> Items:
        c, n = self.config, ENTITY_BLOCK
        rng = np.random.default_rng([self.seed, 2, block])
        category = rng.choice(c.categories, n, p=_normalised(1 / np.arange(3, c.categories + 3)))
        latent = self._category_centre[category] + rng.normal(0, 0.35, (n, c.latent_dim))
        author = category * AUTHORS_PER_CATEGORY + np.minimum(rng.zipf(1.5, n) - 1, AUTHORS_PER_CATEGORY - 1)
        # A tag gives the sign of one latent dimension. An item has the tags of its three strongest ones, with noise.
        noisy = latent + rng.normal(0, 0.5, latent.shape)
        strongest = np.argsort(-np.abs(noisy), axis=1)[:, :TAGS_PER_ITEM]
        tags = 2 * strongest + (np.take_along_axis(noisy, strongest, axis=1) > 0)
        return Items(
            category=category,
            latent=latent,
            quality=self._author_quality[author] + rng.normal(0, 0.4, n),
            popularity=1 / (rng.random(n) + 1e-3),  # Zipf's law with exponent 1, cut at 1,000 times the smallest
            author=author,
            tags=tags,
            duration_s=np.clip(rng.lognormal(0.7, 0.5, n), 0.5, 4.5),
        )


class Population(Generic[E]):
    """Entities in the order of their ids. They are made when they are first needed.

    Args:
        make: Block number → the ``ENTITY_BLOCK`` entities of that block.
        expected: How many entities to make at once.
    """

    def __init__(self, make: Callable[[int], E], expected: int) -> None:
        self._make = make
        self._blocks = 0
        self._all: E | None = None
        self.first(expected)

    def first(self, count: int) -> E:
        """The first ``count`` entities."""
        if self._all is None or self._blocks * ENTITY_BLOCK < count:
            # Growing by half keeps the cost of copying proportional to the population.
            wanted = max(-(-count // ENTITY_BLOCK), self._blocks * 3 // 2)
            made = [self._make(block) for block in range(self._blocks, wanted)]
            parts = made if self._all is None else [self._all, *made]
            self._all = _joined(parts)
            self._blocks = wanted
        everyone = self._all
        return replace(everyone, **{f.name: getattr(everyone, f.name)[:count] for f in fields(everyone)})


def _joined(parts: list[E]) -> E:
    columns: dict[str, Any] = {f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(parts[0])}
    return replace(parts[0], **columns)


def _chain(conditional: F64) -> F64:
    """From probabilities given a positive parent to unconditional ones, [N, T]. Parents come before their children."""
    marginal = conditional.copy()
    for t, task in enumerate(OUTCOME_TASKS):
        if task.parent is not None:
            marginal[:, t] *= marginal[:, TASK_NAMES.index(task.parent)]
    return marginal


def _sigmoid(logits: F64) -> F64:
    probabilities: F64 = 1 / (1 + np.exp(-logits))
    return probabilities


def _normalised(weights: F64) -> F64:
    shares: F64 = weights / weights.sum()
    return shares
