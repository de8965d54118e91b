"""Events as a caller gives them, checked against the schema field by field and written in their JSON form.

What a good event is, and the words for what is wrong with one, are the reader's (:mod:`stream.codec.validation`).
"""

from collections.abc import Callable, Iterable, Mapping
from operator import index
from typing import Any

import msgspec
import numpy as np

from smes.hashing import encode_id
from smes.schema import ITEM_ID, USER_ID, Feature, Schema
from stream.codec.json_structs import declared_features
from stream.codec.record_headers import MAX_BYTES
from stream.codec.validation import Problem, TimeBounds, feedback_problem, impression_problem

Id = int | str
"""An id, or a text that becomes one by :func:`smes.hashing.encode_id`."""

_SERVED = ("arm", "version", "scores")


class EventForms:
    """Makes events of one schema. Safe to share between threads.

    Args:
        schema: What they must fit.
        now_ms: Wall clock in Unix milliseconds: the default of an event's time, and what bounds it.
        max_future_ms: How far an event's time may lie after now; the reader's own default.
    """

    def __init__(self, schema: Schema, now_ms: Callable[[], int], max_future_ms: int = 300_000) -> None:
        self._schema, self._now_ms, self._max_future_ms = schema, now_ms, max_future_ms
        self._features = {f.name: f for f in declared_features(schema)}
        self._encode = msgspec.json.Encoder().encode

    def impression(
        self,
        impression_id: int,
        user: Id,
        item: Id,
        features: Mapping[str, Any] | None,
        request: Id | None,
        served: Mapping[str, Any] | None,
        time_ms: int | None,
    ) -> bytes:
        """The JSON form of an impression.

        Raises:
            ValueError: A field is not what the schema wants; the message names it.
        """
        now_ms = self._now_ms()
        event: dict[str, Any] = {
            "impression_id": impression_id,
            USER_ID: id_of(user, "user"),
            ITEM_ID: id_of(item, "item"),
            "event_time_ms": now_ms if time_ms is None else _integer(time_ms),
        }
        if request is not None:
            event["request_id"] = id_of(request, "request")
        if features:
            event["features"] = plain_features(features, self._features, "features")
        if served:
            event["served"] = self._served(served)
        return self._checked(event, impression_problem(event, self._schema, now_ms, self._bounds(now_ms)))

    def feedback(self, impression: Id, task: str, value: float, time_ms: int | None) -> tuple[int, bytes]:
        """The impression's id and the JSON form of a feedback event.

        Raises:
            ValueError: As :meth:`impression`.
        """
        now_ms = self._now_ms()
        impression_id = id_of(impression, "impression")
        event = {
            "impression_id": impression_id,
            "event_time_ms": now_ms if time_ms is None else _integer(time_ms),
            "task": task,
            "value": _number(value),
        }
        return impression_id, self._checked(event, feedback_problem(event, self._schema, now_ms, self._bounds(now_ms)))

    def _bounds(self, now_ms: int) -> TimeBounds:
        return TimeBounds(self._max_future_ms, now_ms)

    def _served(self, served: Mapping[str, Any]) -> dict[str, Any]:
        """What was served, without tasks that the schema does not have: the scorer may be of a later schema."""
        _refuse_unknown(served, _SERVED, "served")
        plain = {name: _integer(value) if name == "version" else value for name, value in served.items()}
        if isinstance(scores := served.get("scores"), Mapping):
            tasks = self._schema.task_index
            plain["scores"] = {task: _number(score) for task, score in scores.items() if task in tasks}
        return plain

    def _checked(self, event: dict[str, Any], problem: Problem | None) -> bytes:
        if problem is not None:
            raise ValueError(problem.reason)
        value = self._encode(event)
        if len(value) > MAX_BYTES["json"]:
            raise ValueError(f"event: {len(value)} bytes, expected at most {MAX_BYTES['json']}")
        return value


def id_of(value: object, field: str) -> int:
    """The id that stands for a value.

    Raises:
        ValueError: The value is none; the message names the field.
    """
    plain = _plain_id(value)
    if type(plain) is not int or _is_empty(value):
        raise ValueError(f"{field}: {value!r:.60}, expected an integer or a text that is not empty")
    return plain


def plain_features(values: Mapping[str, Any], features: Mapping[str, Feature], where: str) -> dict[str, Any]:
    """Features as JSON has them: texts as ids, NumPy's numbers as Python's. What is missing, or empty, is left out.

    Raises:
        ValueError: A name is unknown, or a text is no id.
    """
    _refuse_unknown(values, features, where)
    return {
        name: _plain(value, features[name], f"{where}.{name}")
        for name, value in values.items()
        if value is not None and not _is_empty(value)
    }


def _plain(value: Any, feature: Feature, field: str) -> Any:
    try:
        if feature.kind == "numeric":
            return _number(value)
        if not feature.is_list:
            return _plain_id(value)
        if isinstance(value, list | tuple | np.ndarray):
            return [_plain_id(each) for each in value if not _is_empty(each)]
        return value  # for the check to refuse, as it was given
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None


def _is_empty(value: object) -> bool:
    """Whether it is the empty text, which means that there is no value, to readers of logs and to the scorer, too."""
    return isinstance(value, str) and not value


def _plain_id(value: Any) -> Any:
    """An id of a text, of a whole float or of NumPy's integers; anything else as it is, for the check to refuse."""
    if isinstance(value, str | float):
        return encode_id(value)
    return _integer(value)


def _integer(value: Any) -> Any:
    return index(value) if isinstance(value, np.integer) else value


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, np.floating | np.integer) else value


def _refuse_unknown(values: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    names = list(known)
    if unknown := values.keys() - set(names):
        expected = f"one of {', '.join(names)}" if names else "none"
        raise ValueError(f"{where}.{min(map(str, unknown))}: unknown, expected {expected}")
