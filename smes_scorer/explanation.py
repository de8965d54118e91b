"""What an answer is made of: which experts answered for each item, and which features were found where.

An explanation is an answer (:mod:`smes_scorer.answer_writer`) and more::

    {"arm": …, "lineage": …, "version": …, "ranking": …, "features_missing": …,
     "features": {"user": {"age": {"value": 31, "source": "store"}},
                  "context": {"hour": {"value": null, "source": "missing"}}},
     "items": [{"item_id": 7, "scores": …, "fused": …,
                "experts": {"click": [[12, 0.41], [3, 0.3]]},
                "features": {"author": {"value": 5, "source": "store"}}}]}

Letters: N items, K items of the answer, T tasks, E experts, V and G id and numeric columns of what the model reads.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from feature_store.entities import EntityRows
from smes.arrays import F32, I64
from smes.derived import in_order
from smes.model.serving import Explained
from smes.schema import ITEM_ID, MISSING, USER_ID, Feature, Schema
from smes_scorer.answer_writer import AnswerWriter
from smes_scorer.missing import Missing
from smes_scorer.request_struct import described

MOST_EXPLAINED = 50
"""Items of one request."""

Source = Literal["request", "store", "derived", "missing"]
Group = Literal["user", "context", "item"]


class FeatureValue(msgspec.Struct, gc=False):
    """What the model was given of a feature.

    Attributes:
        value: An id, a list of ids or a number, before transforms; None where it has none.
        source: Who gave it.
    """

    value: Annotated[int | float | list[int] | None, msgspec.Meta(description="An id, a list of ids, or a number.")]
    source: Annotated[Source, msgspec.Meta(description="Who gave it; derived: computed of others.")]


class RequestFeatures(msgspec.Struct, gc=False):
    """The features that are the same for all items, by name.

    Attributes:
        user: Of the user, and what is derived of them.
        context: Of the context, and what is derived of it or of the time.
    """

    user: dict[str, FeatureValue]
    context: dict[str, FeatureValue]


class ExplanationWriter:
    """Writes explanations for one schema. Safe to share between threads.

    Args:
        schema: The schema.
        writer: Writes its answers.

    Attributes:
        struct: The type of an explanation.
    """

    def __init__(self, schema: Schema, writer: AnswerWriter) -> None:
        self._tasks = [task.name for task in schema.tasks]
        groups = _groups(schema)
        given, read = _Columns(schema), _Columns(schema.inputs)
        own = {f.name for f in schema.features}
        self._given = [(f, groups[f.name], given) for f in schema.features]
        self._derived = [(f, groups[f.name], read) for f in schema.inputs.features if f.name not in own]
        self._item, self.struct = _structs(writer)
        self._encoder = msgspec.json.Encoder()

    def write(
        self, answer: Any, places_K: I64, tasks: Sequence[int] | None, rows: EntityRows, explained: Explained
    ) -> bytes:
        """The JSON of an explanation.

        Args:
            answer: Of :meth:`smes_scorer.answer_writer.AnswerWriter.read`.
            places_K: int64 [K], which of the N items are answered.
            tasks: Places of the tasks that are answered; None: all.
            rows: The instances of the N items, as they were asked for and looked up.
            explained: What the model said of them.
        """
        named = [(t, self._tasks[t]) for t in (range(len(self._tasks)) if tasks is None else tasks)]
        features = [self._features(rows, explained, n) for n in places_K.tolist()]
        experts = [_experts(explained, n, named) for n in places_K.tolist()]
        items = [
            self._item(item.item_id, item.scores, item.fused, experts[k], features[k]["item"])
            for k, item in enumerate(answer.items)
        ]
        of_all = RequestFeatures(features[0]["user"], features[0]["context"])
        return self._encoder.encode(
            self.struct(
                answer.arm, answer.lineage, answer.version, items, answer.ranking, answer.features_missing, of_all
            )
        )

    def _features(self, rows: EntityRows, explained: Explained, n: int) -> dict[Group, dict[str, FeatureValue]]:
        found: dict[Group, dict[str, FeatureValue]] = {"user": {}, "context": {}, "item": {}}
        for feature, group, columns in self._given:
            value = columns.value(feature, rows.ids[n], rows.numerics[n])
            source: Source = "request" if group == "context" or feature.name in (USER_ID, ITEM_ID) else "store"
            found[group][feature.name] = FeatureValue(value, "missing" if value is None else source)
        for feature, group, columns in self._derived:
            value = columns.value(feature, explained.ids_NV[n], explained.numerics_NG[n])
            found[group][feature.name] = FeatureValue(value, "missing" if value is None else "derived")
        return found


class _Columns:
    """Reads values of features out of a schema's columns."""

    def __init__(self, schema: Schema) -> None:
        self._ids = schema.id_slices
        self._numerics = {f.name: i for i, f in enumerate(schema.numeric_features)}

    def value(self, feature: Feature, ids_V: I64, numerics_G: F32) -> int | float | list[int] | None:
        if feature.kind == "numeric":
            number = float(numerics_G[self._numerics[feature.name]])
            return None if math.isnan(number) else number
        ids = [i for i in ids_V[self._ids[feature.name]].tolist() if i != MISSING]
        if feature.is_list:
            return ids or None
        return ids[0] if ids else None


def _groups(schema: Schema) -> dict[str, Group]:
    """Where each feature stands: a derived one with the item if it is computed of the item's, and so on."""
    groups: dict[str, Group] = {f.name: f.source for f in schema.features}
    for derived in in_order(schema.derived):
        of = {groups[name] for name in derived.of}
        if "item" in of:
            groups[derived.name] = "item"
        else:
            groups[derived.name] = "context" if "context" in of or derived.reads_time else "user"
    return groups


def _experts(
    explained: Explained, n: int, named: Sequence[tuple[int, str]]
) -> dict[str, list[tuple[int, float]]] | None:
    """Task → its experts, for one item; None for a ranker without."""
    if explained.experts_NTE is None:
        return None
    return {name: _heaviest(explained.experts_NTE[n, task]) for task, name in named}


def _heaviest(weights_E: F32) -> list[tuple[int, float]]:
    """The experts with a weight, the heaviest first."""
    order_E = np.argsort(-weights_E, kind="stable")
    return [(e, float(weights_E[e])) for e in order_E.tolist() if weights_E[e] > 0]


def _structs(writer: AnswerWriter) -> tuple[type[Any], type[Any]]:
    """The structs of an explained item and of an explanation."""
    experts = dict[str, list[tuple[int, float]]] | None
    item = msgspec.defstruct(
        "ExplainedItem",
        [
            (
                "experts",
                described(
                    experts,
                    "Task → the experts whose output it reads, as [expert, weight], the heaviest first; null where the "
                    "model has no experts.",
                ),
            ),
            ("features", described(dict[str, FeatureValue], "The item's features, and what is derived of them.")),
        ],
        bases=(writer.item_struct,),
        gc=False,
    )
    explanation = msgspec.defstruct(
        "Explanation",
        [
            ("arm", described(str, "The arm that would answer the user.")),
            ("lineage", described(str, "Lineage of the weights.")),
            ("version", described(int, "Version of the weights within the lineage.")),
            # mypy knows no types made at run time.
            ("items", described(list[item], "Items in the order of the request.")),  # type: ignore[valid-type]
            ("ranking", described(list[int | str], "The items, best first.")),
            ("features_missing", described(Missing, "The features without which the items were scored.")),
            ("features", described(RequestFeatures, "The features that are the same for all items.")),
        ],
        gc=False,
    )
    return item, explanation
