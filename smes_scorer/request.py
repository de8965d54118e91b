"""What a scoring request may say, and how its context enters the feature matrices."""

import math
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from feature_store.entities import EntityRows
from smes.schema import MISSING, Feature, Schema

_LARGEST_ID = 2**63 - 1
_LARGEST_FLOAT = float(np.finfo(np.float32).max)

Id = Annotated[StrictInt, Field(ge=MISSING + 1, le=_LARGEST_ID)]
"""An int64 other than the null."""


class ScoreRequest(BaseModel):
    """A user, the circumstances, and the items to rank for them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    user_id: Id = Field(description="Integer id of the user; one never seen before is scored from what is known.")
    items: list[Id] = Field(min_length=1, description="Integer ids of the candidate items.")
    context: dict[str, Any] = Field(
        default_factory=dict,
        description="Context feature → value: an integer, a list of integers for a bag or a sequence (newest first), a "
        "number for a numeric feature, or null. Names that are no context feature are ignored and counted.",
    )


class FieldError(ValueError):
    """One field of a request is wrong.

    Attributes:
        loc: Where, as in the answers of FastAPI: ``("body", "context", "hour")``.
    """

    def __init__(self, loc: tuple[str | int, ...], message: str) -> None:
        super().__init__(message)
        self.loc = loc


class ContextReader:
    """Writes a request's context into the matrices.

    Args:
        schema: Only its context features are read from a request.
    """

    def __init__(self, schema: Schema) -> None:
        context = [f for f in schema.features if f.source == "context"]
        self._ids = {f.name: (f, schema.id_slices[f.name].start) for f in context if f.kind != "numeric"}
        self._companions = {name: f for name, f in schema.companions.items() if name in self._ids}
        self._numerics = {f.name: schema.numeric_features.index(f) for f in context if f.kind == "numeric"}

    def read(self, context: Mapping[str, Any]) -> tuple[dict[int, int], dict[int, float], int]:
        """(id column → value, numeric column → value, how many names are no context feature).

        Raises:
            FieldError: A value is of the wrong type or out of range.
        """
        ids: dict[int, int] = {}
        numerics: dict[int, float] = {}
        ignored = 0
        for name, value in context.items():
            if name in self._ids:
                feature, start = self._ids[name]
                ids.update(enumerate(_id_values(feature, value), start))
            elif name in self._numerics:
                numerics[self._numerics[name]] = _number(name, value)
            else:
                ignored += 1
        self._check_alignment(context)
        return ids, numerics, ignored

    def _check_alignment(self, context: Mapping[str, Any]) -> None:
        """A sequence has as many ids as the one it accompanies; values are known to be lists or None."""
        for name, companions in self._companions.items():
            expected = len(context.get(name) or ())
            for companion in companions:
                came = len(context.get(companion.name) or ())
                if came != expected:
                    message = f"expected as many integers as {name!r} has, {expected}, got {came}"
                    raise FieldError(("body", "context", companion.name), message)


def fill(rows: EntityRows, ids: Mapping[int, int], numerics: Mapping[int, float]) -> None:
    """Write the context's columns into every row."""
    for column, value in ids.items():
        rows.ids[:, column] = value
    for column, number in numerics.items():
        rows.numerics[:, column] = number


def _id_values(feature: Feature, value: object) -> list[int]:
    """The feature's columns: one id, or a bag or sequence cut at its length."""
    if value is None:
        return []
    if feature.kind == "id":
        return [_identifier(("body", "context", feature.name), value)]
    if not isinstance(value, list):
        raise FieldError(("body", "context", feature.name), f"expected a list of integers, got {_short(value)}")
    return [_identifier(("body", "context", feature.name, i), v) for i, v in enumerate(value)][: feature.max_length]


def _identifier(loc: tuple[str | int, ...], value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise FieldError(loc, f"expected an integer, got {_short(value)}")
    if not MISSING < value <= _LARGEST_ID:
        raise FieldError(loc, f"expected an integer of 64 bits, got {_short(value)}")
    return value


def _number(name: str, value: object) -> float:
    if value is None:
        return math.nan
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= _LARGEST_FLOAT:
        raise FieldError(("body", "context", name), f"expected a finite number, got {_short(value)}")
    return float(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
