"""The answer to a scoring request, with the caller's own ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from smes.errors import SmesError
from smes_client.checked import Id


@dataclass(frozen=True, slots=True)
class ScoredItem:
    """One item of an answer.

    Attributes:
        item_id: As it was asked for.
        scores: Name of a task → a probability, or a value in the task's unit.
        fused: The weighted sum by which items are ranked.
    """

    item_id: Id
    scores: Mapping[str, float]
    fused: float


@dataclass(frozen=True, slots=True)
class Answer:
    """All scores of one request, by one version of one arm.

    Attributes:
        arm: Who answered.
        lineage, version: The weights that answered.
        items: In the order of the request.
        ranking: Ids, best first.
        features_missing: What the scorer did not have, as it says; empty where it says nothing.
    """

    arm: str
    lineage: str
    version: int
    items: Sequence[ScoredItem]
    ranking: Sequence[Id]
    features_missing: Mapping[str, Any] = field(default_factory=dict)

    def served(self, place: int) -> dict[str, Any]:
        """What to hand to :meth:`smes_client.events.Events.impression` of an item that is shown.

        Args:
            place: Of the item in ``ranking``.
        """
        item_id = self.ranking[place]
        scored = next(each for each in self.items if each.item_id == item_id)
        return {"arm": self.arm, "version": self.version, "scores": dict(scored.scores)}


class _Scored(msgspec.Struct):
    scores: dict[str, float]
    fused: float


class _Body(msgspec.Struct):
    arm: str
    lineage: str
    version: int
    items: list[_Scored]
    features_missing: dict[str, Any] = {}


_decoder = msgspec.json.Decoder(_Body)


def answer_of(body: bytes, asked: Sequence[Id]) -> Answer:
    """The answer that a body holds.

    Args:
        body: JSON.
        asked: The items of the request, in order.

    Raises:
        SmesError: It is no answer to this request.
    """
    try:
        read = _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SmesError(f"scorer: expected an answer with arm, version and items: {str(error)[:200]}") from error
    if len(read.items) != len(asked):
        raise SmesError(f"scorer: {len(read.items)} items answered, expected {len(asked)}")
    items = [ScoredItem(item_id, s.scores, s.fused) for item_id, s in zip(asked, read.items, strict=True)]
    ranking = [each.item_id for each in sorted(items, key=lambda each: -each.fused)]
    return Answer(read.arm, read.lineage, read.version, items, ranking, read.features_missing)
