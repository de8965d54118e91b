"""The body of an answer.

An answer::

    {"arm": "main", "lineage": "a1b2", "version": 1200,
     "items": [{"item_id": 7, "scores": {"click": 0.31, "watch_time_s": 12.5}, "fused": 0.31}], "ranking": [7],
     "features_missing": {"user": ["age"], "context": [], "items": {"author": 1}}}

Letters: N items, T tasks.
"""

from typing import Any

import msgspec
import numpy as np

from smes.arrays import F32
from smes.errors import SmesError
from smes.schema import Schema
from smes_scorer.missing import Missing
from smes_scorer.request import described


class AnswerWriter:
    """Writes answers for one schema. Safe to share between threads.

    Args:
        schema: Tasks of an answer.
        fusion_weights: float32 [T], the factor of each task's score in the fused score.

    Attributes:
        struct, item_struct: Types of an answer and of an item in it.
    """

    def __init__(self, schema: Schema, fusion_weights: F32) -> None:
        self._fusion_weights = fusion_weights
        self._scores, self.item_struct, self.struct = _answer_structs(schema)
        self._encoder = msgspec.json.Encoder()

    def write(self, arm: str, key: tuple[str, int], items: list[int | str], scores_NT: F32, missing: Missing) -> bytes:
        """The JSON of an :meth:`answer`; arguments and errors as there."""
        return self._encoder.encode(self.answer(arm, key, items, scores_NT, missing))

    def answer(
        self, arm: str, key: tuple[str, int], items: list[int | str], scores_NT: F32, missing: Missing
    ) -> msgspec.Struct:
        """An answer, of the type :attr:`struct`.

        Args:
            arm: Name of the arm that answers.
            key: Lineage and version that answer.
            items: The items as requested.
            scores_NT: float32 [N, T], their scores.
            missing: Which features had no value.

        Raises:
            SmesError: A score is NaN or infinite.
        """
        lineage, version = key
        if not np.isfinite(scores_NT).all():
            raise SmesError(f"snapshot {lineage}:{version} gave a score that is no finite number")
        fused_N = scores_NT @ self._fusion_weights
        rows = zip(items, scores_NT.tolist(), fused_N.tolist(), strict=True)
        scored = [self.item_struct(item, self._scores(*scores), fused) for item, scores, fused in rows]
        ranking = [items[i] for i in np.argsort(-fused_N, kind="stable").tolist()]
        answer: msgspec.Struct = self.struct(arm, lineage, version, scored, ranking, missing)
        return answer


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
            ("item_id", described(int | str, "The item as it was asked for.")),
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
                described(
                    list[int | str], "The items, best first; items with equal scores in the order of the request."
                ),
            ),
            ("features_missing", described(Missing, "The features without which the items were scored.")),
        ],
        gc=False,
    )
    return scores, item_scores, answer
