"""The type of a scoring request, made from the schema: msgspec decodes a body into it, and OpenAPI describes it."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

import msgspec
import numpy as np

from smes.schema import MISSING, Feature

LARGEST_ID = 2**63 - 1
_LARGEST_FLOAT = float(np.finfo(np.float32).max)

_Integer = Annotated[int, msgspec.Meta(ge=MISSING + 1, le=LARGEST_ID)]  # an int64 other than the null
_Id = _Integer | Annotated[str, msgspec.Meta(min_length=1)]
_Number = Annotated[float, msgspec.Meta(ge=-_LARGEST_FLOAT, le=_LARGEST_FLOAT)]
_Count = Annotated[int, msgspec.Meta(ge=1)]
_TYPES: dict[str, Any] = {"id": _Integer | str, "bag": list[_Id], "sequence": list[_Id], "numeric": _Number}


def request_struct(
    features: Sequence[Feature], tasks: Sequence[str], max_items: int, *, ignoring: bool = False
) -> type[msgspec.Struct]:
    """The struct of a request; fields ``f0 …`` stand for features, whose names need be no identifiers.

    Args:
        features: The context features.
        tasks: Names of the tasks.
        max_items: Most items, for the JSON schema.
        ignoring: Whether other names in the context are passed over.
    """
    context = msgspec.defstruct(
        "Context",
        [(f"f{i}", described(_TYPES[f.kind] | None, _description(f)), None) for i, f in enumerate(features)],
        rename={f"f{i}": f.name for i, f in enumerate(features)},
        forbid_unknown_fields=not ignoring,
        gc=False,
    )
    items = msgspec.Meta(
        min_length=1,
        description="Ids of the candidate items, integers or texts.",
        extra_json_schema={"maxItems": max_items},
    )
    names: Any = cast(Any, Literal)[tuple(tasks)]
    chosen = msgspec.Meta(
        min_length=1,
        description="Answer only the scores of these tasks; null: of all.",
        extra_json_schema={"uniqueItems": True},
    )
    return msgspec.defstruct(
        "ScoreRequest",
        [
            ("user_id", described(_Id, "Id of the user; an unknown one is scored without stored features.")),
            ("items", cast(Any, Annotated[list[_Id], items])),
            (
                "context",
                described(context, "Values of the context features. Other names are ignored and counted."),
                msgspec.field(default_factory=context),
            ),
            ("top_k", described(_Count | None, "Answer only so many items, the best ones; null: all."), None),
            ("tasks", cast(Any, Annotated)[cast(Any, list)[names], chosen] | None, None),
        ],
        forbid_unknown_fields=True,
        gc=False,
    )


def described(hint: Any, description: str) -> Any:
    """A field's type with its description in the JSON schema."""
    return Annotated[hint, msgspec.Meta(description=description)]


def _description(feature: Feature) -> str:
    """What a caller must know of a context feature."""
    if feature.kind == "numeric":
        return "A finite number; null: missing."
    if feature.kind == "id":
        return "An id, an integer or a text; null: missing."
    order = "newest first" if feature.kind == "sequence" else "in any order"
    kept = f"Ids, integers or texts, {order}; the first {feature.max_length} are used; null: none."
    return f"{kept} As many as {feature.accompanies} has." if feature.accompanies else kept
