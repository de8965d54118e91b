"""The answer to a scoring request, with the caller's own ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from smes.errors import SmesError
from smes_client.checked import Id


@dataclass(frozen=True, slots=True)
class ScoredItem:
    """One item of an answer.

    Attributes:
        item_id: As it was asked for.
        scores: Name of a task → a probability, or a value in the task's unit; of all tasks or of those asked for.
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
        items: In the order of the request; all of them, or the best ``top_k``.
        ranking: Their ids, best first.
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


class Sent(NamedTuple):
    """What a request asked for.

    Attributes:
        items: The caller's ids, in order.
        ids: The ids that were sent for them.
        answered: How many of them are to be answered.
    """

    items: Sequence[Id]
    ids: Sequence[int]
    answered: int


class _Scored(msgspec.Struct):
    item_id: int
    scores: dict[str, float]
    fused: float


class _Body(msgspec.Struct):
    arm: str
    lineage: str
    version: int
    items: list[_Scored]
    features_missing: dict[str, Any] = {}


_decoder = msgspec.json.Decoder(_Body)


def answer_of(body: bytes, sent: Sent) -> Answer:
    """The answer that a body holds.

    Args:
        body: JSON.
        sent: What was asked for.

    Raises:
        SmesError: It is no answer to this request.
    """
    try:
        read = _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SmesError(f"scorer: expected an answer with arm, version and items: {str(error)[:200]}") from error
    if len(read.items) != sent.answered:
        raise SmesError(f"scorer: {len(read.items)} items answered, expected {sent.answered}")
    places = _places([scored.item_id for scored in read.items], sent.ids)
    items = [ScoredItem(sent.items[n], s.scores, s.fused) for n, s in zip(places, read.items, strict=True)]
    ranking = [each.item_id for each in sorted(items, key=lambda each: -each.fused)]
    return Answer(read.arm, read.lineage, read.version, items, ranking, read.features_missing)


def _places(answered: Sequence[int], asked: Sequence[int]) -> list[int]:
    """Where each answered item stands in the request, both in the same order.

    Raises:
        SmesError: One does not stand there.
    """
    places: list[int] = []
    at = iter(range(len(asked)))
    for item_id in answered:
        place = next((n for n in at if asked[n] == item_id), None)
        if place is None:
            raise SmesError(f"scorer: item {item_id} answered, expected the items of the request in their order")
        places.append(place)
    return places
