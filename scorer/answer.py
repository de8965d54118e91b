"""One scoring request from its arrival to its answer, always by one version."""

import time
from collections.abc import Callable

import msgspec
import numpy as np

from scorer.features import FeatureLookup
from scorer.first_answers import FirstAnswers
from scorer.hot_swap import HotSwap
from scorer.request import ContextReader, FieldError, ScoreRequest, fill
from scorer.telemetry import Telemetry
from smes.errors import SmesError
from smes.events import F32
from smes.feature_columns import fill_elapsed
from smes.schema import Schema


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
