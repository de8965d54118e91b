"""Typed structs of the JSON wire form, made from the schema. They accept exactly the good events.

*Strict* structs refuse unknown fields, *lenient* ones skip them.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, Any

import msgspec

from smes.schema import ITEM_ID, MISSING, USER_ID, Feature, Schema
from stream.codec.rules import MAX_FLOAT, MAX_ID, MIN_ID
from stream.codec.validation import unknown_impression_fields

_Id = Annotated[int, msgspec.Meta(ge=MIN_ID, le=MAX_ID)]
_Int64 = Annotated[int, msgspec.Meta(ge=MISSING, le=MAX_ID)]
_Number = Annotated[float, msgspec.Meta(ge=-MAX_FLOAT, le=MAX_FLOAT)]
_TYPES: dict[str, Any] = {"id": _Id, "bag": list[_Id], "sequence": list[_Id], "numeric": _Number}
_ABSENT: dict[str, Any] = {"id": MISSING, "bag": None, "sequence": None, "numeric": float("nan")}


class _Feedback(msgspec.Struct, gc=False):
    impression_id: _Id
    event_time_ms: _Int64
    task: str
    value: float


class _StrictFeedback(_Feedback, gc=False, forbid_unknown_fields=True):
    pass


def _impression_struct(schema: Schema, *, strict: bool) -> type[msgspec.Struct]:
    """The struct of an impression; fields ``f0 …`` stand for the features, whose names need be no identifiers."""

    def struct(name: str, fields: list[tuple[str, Any, Any]], wire_names: Sequence[str] = ()) -> type[msgspec.Struct]:
        rename = {f"f{i}": wire_name for i, wire_name in enumerate(wire_names)} or None
        return msgspec.defstruct(name, fields, rename=rename, gc=False, forbid_unknown_fields=strict)

    features = declared_features(schema)
    scores = [(f"f{i}", _Number | None, _ABSENT["numeric"]) for i in range(schema.num_tasks)]
    columns = [(f"f{i}", _TYPES[f.kind] | None, _ABSENT[f.kind]) for i, f in enumerate(features)]
    scores_type = struct("Scores", scores, [t.name for t in schema.tasks])
    served_type = struct("Served", [("version", _Id | None, MISSING), ("scores", scores_type | None, None)])
    features_type = struct("Features", columns, [f.name for f in features])
    required: list[Any] = ["impression_id", USER_ID, ITEM_ID]
    optional = [("request_id", _Id | None, MISSING), ("features", features_type | None, None)]
    return msgspec.defstruct(
        "Impression",
        [
            *((name, _Id) for name in required),
            ("event_time_ms", _Int64),
            *optional,
            ("served", served_type | None, None),
        ],
        gc=False,
        forbid_unknown_fields=strict,
    )


def declared_features(schema: Schema) -> list[Feature]:
    """The features that an event carries in ``features``: all but the user's and the item's id."""
    return [f for f in schema.features if f.name not in (USER_ID, ITEM_ID)]


class Wire:
    """The decoders of one schema."""

    def __init__(self, schema: Schema) -> None:
        self.strict = msgspec.json.Decoder(_impression_struct(schema, strict=True))
        self.lenient = msgspec.json.Decoder(_impression_struct(schema, strict=False))
        self.count_unknown = unknown_impression_fields(schema)
        self.no_features = (*(_ABSENT[f.kind] for f in declared_features(schema)),)
        self.no_scores = (_ABSENT["numeric"],) * schema.num_tasks


wire_of = lru_cache(maxsize=16)(Wire)
strict_feedback = msgspec.json.Decoder(_StrictFeedback)
lenient_feedback = msgspec.json.Decoder(_Feedback)
