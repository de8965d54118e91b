"""One scoring request from its arrival to its answer, always by one version."""

import time
from collections.abc import Callable

import msgspec
import numpy as np

from feature_store.entities import EntityRows, EntityStore, blank_rows
from smes.arrays import F32, I64
from smes.errors import SmesError
from smes.events import fill_elapsed
from smes.schema import Schema
from smes_scorer.first_answers import FirstAnswers
from smes_scorer.hot_swap import HotSwap
from smes_scorer.request import ContextReader, FieldError, ScoreRequest, fill
from smes_scorer.telemetry import Telemetry

# TODO(merge) was scorer.features: Stored features of a request, or none in time: a slow featur


class FeatureLookup:
    """Reads entity features; on failure, scoring goes on with the ids alone for ``retry_s``, then it is tried again.

    Safe to share between threads.

    Args:
        store: Its client's timeout bounds a look-up.
        schema: Which columns there are.
        telemetry: Counts failures and unknown entities.
        retry_s: How long not to ask after a failure.
        monotonic_s: Clock of the retries.
    """

    def __init__(
        self,
        store: EntityStore,
        schema: Schema,
        telemetry: Telemetry,
        *,
        retry_s: float,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._schema = schema
        self._telemetry = telemetry
        self._retry_s = retry_s
        self._monotonic_s = monotonic_s
        self._asks_again_s = float("-inf")
        self.problem: str | None = None
        """Why the last look-up failed, None when it succeeded."""

    def rows(self, user_id: int, item_ids: I64) -> EntityRows:
        """A user's instances with N items, with what is stored of them."""
        if self._monotonic_s() < self._asks_again_s:
            return self._without(user_id, item_ids)
        try:
            rows = self._store.get(user_id, item_ids)
        except SmesError as error:
            self._telemetry.feature_store_failures.inc()
            self.problem = str(error)
            self._asks_again_s = self._monotonic_s() + self._retry_s
            return self._without(user_id, item_ids)
        self.problem = None
        self._telemetry.unknown_users.inc(not rows.user_known)
        self._telemetry.unknown_items.inc(int((~rows.items_known).sum()))
        return rows

    def _without(self, user_id: int, item_ids: I64) -> EntityRows:
        self._telemetry.scored_without_features.inc()
        return blank_rows(self._schema, user_id, item_ids)


class ItemScores(msgspec.Struct, frozen=True):
    """An item's score per task, and fused: the weighted sum that the ranking is by."""

    item_id: int
    scores: dict[str, float]
    fused: float


class Answer(msgspec.Struct, frozen=True):
    """Items as asked for, their ranking best first (ties in the order asked), and which weights answered."""

    lineage: str
    version: int
    items: list[ItemScores]
    ranking: list[int]


class NotReady(SmesError):
    """There is no snapshot to answer with yet."""


class Answerer:
    """Scores requests. Safe to share between threads.

    Args:
        schema: Features and tasks.
        fusion_weights: float32 [T].
        max_items: Most items of a request.
        swap: Holds the model in service.
        features: Stored features.
        first_answers: Told of every answer.
        telemetry: Counts ignored context and freshness.
        now_ms: Wall clock in Unix milliseconds, the one that stamps arrivals at the event log.
    """

    def __init__(
        self,
        schema: Schema,
        fusion_weights: F32,
        max_items: int,
        swap: HotSwap,
        features: FeatureLookup,
        first_answers: FirstAnswers,
        telemetry: Telemetry,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._schema = schema
        self._tasks = [t.name for t in schema.tasks]
        self._fusion_weights = fusion_weights
        self._max_items = max_items
        self._swap = swap
        self._features = features
        self._first_answers = first_answers
        self._telemetry = telemetry
        self._now_ms = now_ms
        self._context = ContextReader(schema)
        self._encoder = msgspec.json.Encoder()

    def answer(self, request: ScoreRequest) -> bytes:
        """The JSON of an :class:`Answer`.

        Raises:
            FieldError: A field of the request is wrong.
            NotReady: No snapshot was loaded yet.
            SmesError: The model gave a score that is no number.
        """
        if len(request.items) > self._max_items:
            raise FieldError(("body", "items"), f"{len(request.items)} items, expected at most {self._max_items}")
        ids, numerics, ignored = self._context.read(request.context)
        if ignored:
            self._telemetry.ignored_context.inc(ignored)
        if self._swap.served is None:
            raise NotReady(self._swap.problem or "no snapshot was published yet")
        rows = self._features.rows(request.user_id, np.array(request.items, np.int64))
        fill_elapsed(rows.numerics, self._schema, self._now_ms())
        fill(rows, ids, numerics)
        served = self._swap.served  # read once: everything below is of this version
        scores_NT = served.model.score(rows.ids, rows.numerics)
        body = self._encode(served.key, request.items, scores_NT)
        first = self._first_answers.answered(served, self._now_ms())
        if first is not None:
            self._telemetry.first_answer(first)
        return body

    def _encode(self, key: tuple[str, int], items: list[int], scores_NT: F32) -> bytes:
        lineage, version = key
        fused_N = scores_NT @ self._fusion_weights
        if not np.isfinite(scores_NT).all():
            raise SmesError(f"snapshot {lineage}:{version} gave a score that is no finite number")
        columns = zip(items, scores_NT.tolist(), fused_N.tolist(), strict=True)
        scored = [
            ItemScores(item, dict(zip(self._tasks, scores, strict=True)), fused) for item, scores, fused in columns
        ]
        ranking = [items[i] for i in np.argsort(-fused_N, kind="stable").tolist()]
        return self._encoder.encode(Answer(lineage, version, scored, ranking))
