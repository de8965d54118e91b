"""Typed structs of the JSON wire form, made from a schema: they accept exactly the good events.

*Strict* ones refuse unknown fields, *lenient* ones skip them.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, Any

import msgspec

from smes.arm_names import PATTERN
from smes.schema import ITEM_ID, MISSING, USER_ID, Feature, Schema
from stream.codec.limits import max_rows
from stream.codec.requests import IMPRESSIONS
from stream.codec.validation import MAX_FLOAT, MAX_ID, MIN_ID, unknown_impression_fields

_Id = Annotated[int, msgspec.Meta(ge=MIN_ID, le=MAX_ID)]
_Int64 = Annotated[int, msgspec.Meta(ge=MISSING, le=MAX_ID)]
_Arm = Annotated[str, msgspec.Meta(pattern=PATTERN)]
_Number = Annotated[float, msgspec.Meta(ge=-MAX_FLOAT, le=MAX_FLOAT)]
_TYPES: dict[str, Any] = {"id": _Id, "bag": list[_Id], "sequence": list[_Id], "numeric": _Number}
_ABSENT: dict[str, Any] = {"id": MISSING, "bag": None, "sequence": None, "numeric": float("nan")}

Struct = type[msgspec.Struct]


class _Feedback(msgspec.Struct, gc=False):
    impression_id: _Id
    event_time_ms: _Int64
    task: str
    value: float


class _StrictFeedback(_Feedback, gc=False, forbid_unknown_fields=True):
    pass


def declared_features(schema: Schema) -> list[Feature]:
    """The features that an event carries in ``features``: all but the user's and the item's id."""
    return [f for f in schema.features if f.name not in (USER_ID, ITEM_ID)]


def _structs(schema: Schema, *, strict: bool) -> tuple[Struct, Struct, Struct, Struct]:
    """An impression, one within its request, a request, and what a request has beside its impressions.

    The fields of the first two are the same. The first six of the others are those but for the first. Fields ``f0 …``
    stand for the features, whose names need be no identifiers.
    """

    def struct(name: str, fields: list[Any], wire_names: Sequence[str] = ()) -> Struct:
        rename = {f"f{i}": wire_name for i, wire_name in enumerate(wire_names)} or None
        return msgspec.defstruct(name, fields, rename=rename, gc=False, forbid_unknown_fields=strict)

    features = declared_features(schema)
    scores = [(f"f{i}", _Number | None, _ABSENT["numeric"]) for i in range(schema.num_tasks)]
    columns = [(f"f{i}", _TYPES[f.kind] | None, _ABSENT[f.kind]) for i, f in enumerate(features)]
    scores_type = struct("Scores", scores, [t.name for t in schema.tasks])
    served: list[Any] = [
        ("version", _Id | None, MISSING),
        ("scores", scores_type | None, None),
        ("arm", _Arm | None, None),
    ]
    served_type = struct("Served", served)
    features_type = struct("Features", columns, [f.name for f in features])
    required: list[Any] = [(USER_ID, _Id), (ITEM_ID, _Id), ("event_time_ms", _Int64)]
    optional: list[Any] = [(name, _Id | None, MISSING) for name, _ in required]
    others: list[Any] = [
        ("request_id", _Id | None, MISSING),
        ("features", features_type | None, None),
        ("served", served_type | None, None),
    ]
    impression = struct("Impression", [("impression_id", _Id), *required, *others])
    shown = struct("Shown", [("impression_id", _Id), *optional, *others])
    many = Annotated[list[shown], msgspec.Meta(min_length=1, max_length=max_rows(schema))]  # type: ignore[valid-type]
    given: list[Any] = [*optional, *others]
    request = msgspec.defstruct(
        "Request", [*given, (IMPRESSIONS, many)], kw_only=True, gc=False, forbid_unknown_fields=strict
    )
    return impression, shown, request, struct("Given", given)


class Wire:
    """The decoders of one schema.

    Attributes:
        strict, lenient: Of an impression.
        strict_request: Of a request.
        shown: The lenient struct of an impression within its request.
        given: The lenient struct of what a request has beside its impressions.
        count_unknown: Counts the unknown fields of an impression, or of what a request has beside its impressions.
        no_features, no_scores: The fields of structs that are absent.
    """

    def __init__(self, schema: Schema) -> None:
        strict, _, strict_request, _ = _structs(schema, strict=True)
        lenient, self.shown, _, self.given = _structs(schema, strict=False)
        self.strict = msgspec.json.Decoder(strict)
        self.lenient = msgspec.json.Decoder(lenient)
        self.strict_request = msgspec.json.Decoder(strict_request)
        self.count_unknown = unknown_impression_fields(schema)
        self.no_features = (*(_ABSENT[f.kind] for f in declared_features(schema)),)
        self.no_scores = (_ABSENT["numeric"],) * schema.num_tasks


wire_of = lru_cache(maxsize=16)(Wire)
strict_feedback = msgspec.json.Decoder(_StrictFeedback)
lenient_feedback = msgspec.json.Decoder(_Feedback)
