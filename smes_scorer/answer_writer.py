"""The body of an answer.

An answer::

    {"arm": "main", "lineage": "a1b2", "version": 1200,
     "items": [{"item_id": 7, "scores": {"click": 0.31, "watch_time_s": 12.5}, "fused": 0.31}], "ranking": [7],
     "features_missing": {"user": ["age"], "context": [], "items": {"author": 1}}}

Letters: N items, T tasks.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from smes.arrays import F32, I64
from smes.errors import SmesError
from smes.schema import Schema
from smes_scorer.answer_kernels import FRAME_BYTES, NOT_FINITE, NUMBER_BYTES, U8, write_items
from smes_scorer.missing import Missing
from smes_scorer.request import ScoreRequest
from smes_scorer.request_struct import described


class AnswerWriter:
    """Writes answers for one schema. Safe to share between threads.

    Items, scores and ranking are written by a compiled loop, which makes no object of Python for each of them.

    Args:
        schema: Tasks of an answer.
        fusion_weights: float32 [T], the factor of each task's score in the fused score.

    Attributes:
        struct, item_struct: Types of an answer and of an item in it.
    """

    def __init__(self, schema: Schema, fusion_weights: F32) -> None:
        self._fusion_weights = fusion_weights
        self.item_struct, self.struct = _answer_structs(schema)
        self._encode = msgspec.json.Encoder().encode
        self._decoder = msgspec.json.Decoder(self.struct)
        self._names = [self._encode(task.name) for task in schema.tasks]
        self._all_C = np.arange(len(schema.tasks))
        self._pieces_of_all = self._pieces(range(len(self._names)))

    def write(self, arm: str, key: tuple[str, int], request: ScoreRequest, scores_NT: F32, missing: Missing) -> bytes:
        """The JSON of an answer.

        Args:
            arm: Name of the arm that answers.
            key: Lineage and version that answer.
            request: Has N items, and says which of them and which tasks are answered.
            scores_NT: float32 [N, T], the scores of all.
            missing: Which features had no value.

        Raises:
            SmesError: A score is NaN or infinite.
        """
        lineage, version = key
        scores_NT = np.ascontiguousarray(scores_NT)
        with np.errstate(invalid="ignore", over="ignore"):  # what is no number is found below
            fused_N = scores_NT @ self._fusion_weights
        items_K, ranking_K = _chosen(request, fused_N)
        columns_C, (pieces, ends) = self._all_C, self._pieces_of_all
        if request.tasks is not None:
            columns_C, (pieces, ends) = np.array(request.tasks), self._pieces(request.tasks)
        listed = np.frombuffer(self._encode(request.items), np.uint8)
        frame = FRAME_BYTES + len(pieces) + (len(columns_C) + 1) * NUMBER_BYTES
        out = np.empty((len(items_K) + 1) * frame + 2 * len(listed), np.uint8)
        length = write_items(listed, items_K, ranking_K, columns_C, scores_NT, fused_N, pieces, ends, out)
        if length == NOT_FINITE:
            raise SmesError(f"snapshot {lineage}:{version} gave a score that is no finite number")
        before = b'{"arm":%b,"lineage":%b,"version":%d,"items":[' % (self._encode(arm), self._encode(lineage), version)
        after = b'],"features_missing":%b}' % self._encode(missing)
        return b"".join((before, out[:length].data, after))

    def read(self, written: bytes) -> Any:
        """What was written, of the type :attr:`struct`."""
        return self._decoder.decode(written)

    def places(self, request: ScoreRequest, scores_NT: F32) -> I64:
        """Which of the N items are answered, in the order of the answer; int64 [K]."""
        return _chosen(request, scores_NT @ self._fusion_weights)[0]

    def _pieces(self, tasks: Sequence[int]) -> tuple[U8, I64]:
        """What stands before each score of an item and before its fused score, and where each of these ends."""
        names = [self._names[task] for task in tasks]
        pieces = [b',"scores":{%b:' % names[0], *(b",%b:" % name for name in names[1:]), b'},"fused":']
        return np.frombuffer(b"".join(pieces), np.uint8), np.cumsum([len(piece) for piece in pieces])


def _chosen(request: ScoreRequest, fused_N: F32) -> tuple[I64, I64]:
    """The items of an answer in the order of the request, and the best first; int64 [K] each."""
    ranking_N = np.argsort(-fused_N, kind="stable")
    if request.top_k is None or request.top_k >= len(fused_N):
        return np.arange(len(fused_N)), ranking_N
    return np.sort(ranking_N[: request.top_k]), ranking_N[: request.top_k]


def _answer_structs(schema: Schema) -> tuple[type[Any], type[Any]]:
    """The structs of an item in an answer, and of an answer.

    Fields ``t0 …`` stand for tasks, whose names need be no identifiers.
    """

    scores = msgspec.defstruct(
        "Scores",
        [
            (
                f"t{i}",
                described(
                    float | msgspec.UnsetType,
                    "A probability." if t.kind == "binary" else f"A value in {t.unit or 'its unit'}.",
                ),
                msgspec.UNSET,
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
            ("scores", described(scores, "Score of each task, or of those that were asked for.")),
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
            (
                "items",
                # mypy knows no types made at run time.
                described(
                    list[item_scores],  # type: ignore[valid-type]
                    "Items in the order of the request; with `top_k` the best.",
                ),
            ),
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
    return item_scores, answer
