"""Impressions of one request in one record, in plain values: what they share stands once, beside them.

::

    {"request_id": 5, "user_id": 7, "event_time_ms": 1700000000000, "features": {"tab": 1},
     "impressions": [{"impression_id": 1, "item_id": 9, "features": {"price": 1.5}},
                     {"impression_id": 2, "item_id": 8, "features": {"price": 2.0}}]}

An impression has its own fields and features, and those of its request. A value may stand in both places only if it is
the same. Null, and an empty array, is no value. So a record is whole: it refers to no other, and no order, loss or
repetition of records can give an impression the features of another request.
"""

from collections.abc import Sequence
from typing import Any

from smes.schema import ITEM_ID, USER_ID, Schema
from stream.codec.validation import Problem, TimeBounds, impression_problem, quoted, shared_problem

IMPRESSIONS = "impressions"
"""The field that makes an event a request."""

_TOP = (USER_ID, ITEM_ID, "event_time_ms", "request_id")
_HOLDERS = ("features", "served")
_REQUIRED = (USER_ID, ITEM_ID, "event_time_ms")


def is_request(event: object) -> bool:
    """Whether an event in its JSON form holds impressions; one with an impression's id is an impression."""
    return isinstance(event, dict) and event.get(IMPRESSIONS) is not None and event.get("impression_id") is None


def given_of(event: dict[str, Any]) -> dict[str, Any]:
    """What a request has beside its impressions."""
    return {name: value for name, value in event.items() if name != IMPRESSIONS}


def impressions_problem(event: dict[str, Any], most: int) -> Problem | None:
    """Why no impression of a request can be read; None if each is to be judged by itself."""
    shown = event[IMPRESSIONS]
    if not isinstance(shown, list):
        return Problem("bad_type", f"{IMPRESSIONS}: expected an array, got {quoted(shown)}", IMPRESSIONS)
    if not shown:
        return Problem("missing_field", f"{IMPRESSIONS}: expected at least one, got none", IMPRESSIONS)
    if len(shown) > most:
        reason = f"{IMPRESSIONS}: {len(shown)} of them, expected at most {most} with this schema"
        return Problem("too_large", reason, IMPRESSIONS)
    return None


def shown_problem(
    shown: object, given: dict[str, Any], schema: Schema, arrival_ms: int, bounds: TimeBounds
) -> Problem | None:
    """The first fault of an impression of a request whose own fields are good."""
    if not isinstance(shown, dict):
        return impression_problem(shown, schema, arrival_ms, bounds)
    whole = {name: given[name] for name in _REQUIRED if name in given}
    whole |= {name: value for name, value in shown.items() if value is not None or name not in whole}
    return impression_problem(whole, schema, arrival_ms, bounds, given.get("features"))


def event_problem(event: object, schema: Schema, arrival_ms: int, bounds: TimeBounds) -> Problem | None:
    """The first fault of an impression, or of a request with one impression."""
    if not is_request(event):
        return impression_problem(event, schema, arrival_ms, bounds)
    assert isinstance(event, dict)
    given, [shown] = given_of(event), event[IMPRESSIONS]
    return shared_problem(given, schema, arrival_ms, bounds) or shown_problem(shown, given, schema, arrival_ms, bounds)


def conflict(name: str) -> Problem:
    """An impression has another value than its request."""
    return Problem("conflict", f"{name}: expected one value, got one of the request and another of an impression", name)


def together(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Two or more impressions of one request as one event. What all of them share stands once; they lose it."""
    first, others = events[0], events[1:]
    request: dict[str, Any] = {}

    def move(name: str, of: Sequence[dict[str, Any]], to: dict[str, Any]) -> None:
        if all(name in each and each[name] == of[0][name] for each in of[1:]):
            to[name] = of[0][name]
            for each in of:
                del each[name]

    for name in _TOP:
        if name in first:
            move(name, events, request)
    for holder in _HOLDERS:
        if holder in first and all(holder in each for each in others):
            inside = [each[holder] for each in events]
            shared: dict[str, Any] = {}
            for name in list(inside[0]):
                move(name, inside, shared)
            if shared:
                request[holder] = shared
            for each in events:
                if not each[holder]:
                    del each[holder]
    return {**request, IMPRESSIONS: list(events)}


def alone(request: dict[str, Any], shown: dict[str, Any]) -> dict[str, Any]:
    """An impression with what it shares with others, as an event of its own."""
    whole = {**given_of(request), **shown}
    for holder in _HOLDERS:
        if holder in whole:
            whole[holder] = {**request.get(holder, {}), **shown.get(holder, {})}
    return whole
