"""One scoring request from its body to the body of its answer, by one arm and one version of its weights.

An answer::

    {"arm": "main", "lineage": "a1b2", "version": 1200,
     "items": [{"item_id": 7, "scores": {"click": 0.31, "watch_time_s": 12.5}, "fused": 0.31}], "ranking": [7]}

Letters: N items, T tasks.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from feature_store.entities import EntityRows, EntityStore, blank_rows
from smes.arm_names import MAIN
from smes.arrays import F32, I64
from smes.errors import SmesError
from smes.events import fill_elapsed
from smes.schema import Schema
from smes_io.clock import wall_clock_ms
from smes_scorer.arms import NO_ARMS, Arm, Arms
from smes_scorer.config import ScorerConfig, fusion_weights
from smes_scorer.first_answers import FirstAnswers
from smes_scorer.hot_swap import HotSwap
from smes_scorer.request import RequestReader, described
from smes_scorer.shadow_scoring import Answered
from smes_scorer.telemetry import Telemetry

_logger = logging.getLogger(__name__)


class NotReady(SmesError):
    """No snapshot was loaded yet, so there is nothing to answer with."""


class FeatureLookup:
    """Looks up stored features. When a look-up fails, requests are scored without them for ``retry_s``.

    Safe to share between threads.

    Args:
        store: Where the features are; its client's timeout bounds a look-up.
        schema: Which columns there are.
        telemetry: Counts failures and unknown entities.
        retry_s: After a failure, how long no look-up is tried.
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
        self._next_try_s = float("-inf")
        self.problem: str | None = None
        """Why the last look-up failed or what it found broken, None when neither."""

    def rows(self, user_id: int, item_ids: I64) -> EntityRows:
        """The instances of a user with N items, with their stored features where they could be looked up."""
        if self._monotonic_s() < self._next_try_s:
            return self._without_features(user_id, item_ids)
        try:
            rows = self._store.get(user_id, item_ids)
        except SmesError as error:
            self._telemetry.feature_store_failures.inc()
            self.problem = str(error)
            self._next_try_s = self._monotonic_s() + self._retry_s
            return self._without_features(user_id, item_ids)
        self.problem = rows.problem
        self._telemetry.unknown_users.inc(not rows.user_known)
        self._telemetry.unknown_items.inc(int((~rows.items_known).sum()))
        return rows

    def _without_features(self, user_id: int, item_ids: I64) -> EntityRows:
        self._telemetry.scored_without_features.inc()
        return blank_rows(self._schema, user_id, item_ids)


class AnswerWriter:
    """Writes answers for one schema. Safe to share between threads.

    Args:
        schema: Tasks of an answer.
        fusion_weights: float32 [T], the factor of each task's score in the fused score.
    """

    def __init__(self, schema: Schema, fusion_weights: F32) -> None:
        self._fusion_weights = fusion_weights
        self._scores, self._item_scores, self.struct = _answer_structs(schema)
        self._encoder = msgspec.json.Encoder()

    def write(self, arm: str, key: tuple[str, int], items: list[int], scores_NT: F32) -> bytes:
        """The JSON of an answer.

        Args:
            arm: Name of the arm that answers.
            key: Lineage and version that answer.
            items: The items as requested.
            scores_NT: float32 [N, T], their scores.

        Raises:
            SmesError: A score is NaN or infinite.
        """
        lineage, version = key
        if not np.isfinite(scores_NT).all():
            raise SmesError(f"snapshot {lineage}:{version} gave a score that is no finite number")
        fused_N = scores_NT @ self._fusion_weights
        rows = zip(items, scores_NT.tolist(), fused_N.tolist(), strict=True)
        scored = [self._item_scores(item, self._scores(*scores), fused) for item, scores, fused in rows]
        ranking = [items[i] for i in np.argsort(-fused_N, kind="stable").tolist()]
        return self._encoder.encode(self.struct(arm, lineage, version, scored, ranking))


class Answerer:
    """Answers scoring requests. Safe to share between threads.

    Args:
        config: Fusion weights and the most items of a request.
        schema: Features and tasks.
        swap: Holds the model in service.
        features: Stored features.
        first_answers: Notes each version's first answer, for freshness.
        telemetry: Counts ignored context, freshness, and what became of the arms' requests.
        now_ms: Wall clock in Unix milliseconds, the one that stamps arrivals at the event log.
        arms: The other arms.

    Raises:
        ValueError: ``fusion_weights`` names an unknown task.
    """

    def __init__(
        self,
        config: ScorerConfig,
        schema: Schema,
        swap: HotSwap,
        features: FeatureLookup,
        first_answers: FirstAnswers,
        telemetry: Telemetry,
        now_ms: Callable[[], int] = wall_clock_ms,
        arms: Arms = NO_ARMS,
    ) -> None:
        self._schema = schema
        self._swap = swap
        self._arms = arms
        self._features = features
        self._first_answers = first_answers
        self._telemetry = telemetry
        self._now_ms = now_ms
        self.reader = RequestReader(schema, config.max_items, config.max_depth)
        self.writer = AnswerWriter(schema, fusion_weights(config, schema))

    def answer(self, body: bytes) -> bytes:
        """The JSON body of the answer to the JSON body of a request.

        Raises:
            FieldError: A field of the request is wrong.
            UnreadableBody: The body cannot be parsed.
            NotReady: No snapshot was loaded yet.
            SmesError: The model gave a score that is no number.
        """
        request = self.reader.read(body)
        if request.ignored_context:
            self._telemetry.ignored_context.inc(request.ignored_context)
        if self._swap.served is None:
            raise NotReady(self._swap.problem or "no snapshot was published yet")
        rows = self._features.rows(request.user_id, np.array(request.items, np.int64))
        now_ms = self._now_ms()
        fill_elapsed(rows.numerics, self._schema, now_ms)
        request.write_context(rows)
        arm = self._arms.chosen(request.user_id)
        if arm is not None and (by_arm := self._by_arm(arm, rows, now_ms)) is not None:
            key, scores_NT = by_arm
            answer = self.writer.write(arm.name, key, request.items, scores_NT)
            self._note(arm.name, key, arm.first_answers, arm.telemetry)
            return answer
        with self._swap.reading() as served:  # everything below is of this version
            scores_NT = served.model.score(rows.ids, rows.numerics, now_ms)
        answer = self.writer.write(MAIN, served.key, request.items, scores_NT)
        self._note(MAIN, served.key, self._first_answers, self._telemetry)
        self._arms.shadow(request.user_id, Answered(rows.ids, rows.numerics, scores_NT, now_ms))
        return answer

    def _by_arm(self, arm: Arm, rows: EntityRows, now_ms: int) -> tuple[tuple[str, int], F32] | None:
        """A split arm's version and scores; None where it has none, and the main arm is to answer."""
        if not arm.is_ready:
            self._telemetry.arms.fell_back(arm.name, "not_ready")
            return None
        try:
            with arm.swap.reading() as served:
                scores_NT = served.model.score(rows.ids, rows.numerics, now_ms)
        except Exception:
            _logger.warning("arm %s could not score a request, so the main arm does", arm.name, exc_info=True)
            self._telemetry.arms.fell_back(arm.name, "failed")
            return None
        if not np.isfinite(scores_NT).all():
            self._telemetry.arms.fell_back(arm.name, "failed")
            return None
        return served.key, scores_NT

    def _note(self, arm: str, key: tuple[str, int], first_answers: FirstAnswers, telemetry: Telemetry) -> None:
        """Count an answer, and the freshness of its version if it is the version's first."""
        if self._arms.any:
            self._telemetry.arms.answered(arm)
        first = first_answers.answered(key, self._now_ms())
        if first is not None:
            telemetry.first_answer(first)


def _answer_structs(schema: Schema) -> tuple[type[Any], type[Any], type[Any]]:
    """The structs of an item's scores, of an item, and of an answer.

    Fields ``t0 …`` stand for tasks, whose names need be no identifiers.
    """

    scores = msgspec.defstruct(
        "Scores",
        [
            (
                f"t{i}",
                described(float, "A probability." if t.kind == "binary" else f"A value in {t.unit or 'its unit'}."),
            )
            for i, t in enumerate(schema.tasks)
        ],
        rename={f"t{i}": t.name for i, t in enumerate(schema.tasks)},
        gc=False,
    )
    item_scores = msgspec.defstruct(
        "ItemScores",
        [
            ("item_id", int),
            ("scores", described(scores, "Score of each task.")),
            ("fused", described(float, "Weighted sum of the scores, by which items are ranked.")),
        ],
        gc=False,
    )
    answer = msgspec.defstruct(
        "Answer",
        [
            ("arm", described(str, "The arm that answered; copy it into what is logged of the impression.")),
            ("lineage", described(str, "Lineage of the weights.")),
            ("version", described(int, "Version of the weights within the lineage.")),
            # mypy knows no types made at run time.
            ("items", described(list[item_scores], "Items in the order of the request.")),  # type: ignore[valid-type]
            (
                "ranking",
                described(list[int], "Item ids, best first; items with equal scores in the order of the request."),
            ),
        ],
        gc=False,
    )
    return scores, item_scores, answer
