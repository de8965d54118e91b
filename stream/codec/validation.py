"""What a good event is: the limits of its values, and why an event is refused, as a short code and in words.

The decoders find *that* an event is bad, in bulk (typed structs, masks of columns). This module finds *why*, one event
at a time, from the event in its JSON form. Rows of Arrow are brought into that form first, so a fault has the same code
and the same words whichever codec carried it. Letters: N rows.
"""

import reprlib
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from smes.arm_names import EXPECTED, is_arm_name
from smes.arrays import I32, I64, Bool
from smes.schema import ITEM_ID, MISSING, USER_ID, Feature, Schema, Task

Code = Literal[
    "unparsable",  # not JSON, not an Arrow stream, or not an event at all
    "unknown_codec",  # the codec header names no codec we have
    "schema_mismatch",  # the schema header differs, or is absent where it is required
    "missing_field",  # a required field is absent or null
    "bad_id",  # not an integer, outside int64, or the null sentinel
    "bad_time",  # event_time_ms is no integer, or lies outside the year 2000 … the reader's clock + 1 day
    "future_time",  # event_time_ms lies too far after both the record's arrival and the reader's clock
    "bad_number",  # a numeric feature or a score is no finite float32
    "bad_type",  # another value of the wrong type
    "misaligned",  # a sequence of another length than the one it accompanies
    "conflict",  # an impression has another value than its request has for all of its impressions
    "unknown_task",  # feedback of a task that the schema does not have
    "label_range",  # a label outside its task's range
    "too_large",  # the record is larger, or would become larger when decoded, than one record may
    "unreadable",  # in the log, but no record of ours
    "not_finite",  # an example of a training step whose loss or gradients were not finite
]

CODES: tuple[Code, ...] = get_args(Code)
"""All codes."""

MAX_ID = int(np.iinfo(np.int64).max)
MIN_ID = -MAX_ID
"""Ids are int64 without the smallest value, which is the null of every id column (``smes.schema.MISSING``)."""

MAX_FLOAT = float(np.finfo(np.float32).max)
"""Largest number: all are finite as float32."""

EARLIEST_MS = 946_684_800_000
"""No event is older than 2000-01-01 UTC: what is, is most likely in another unit."""

DAY_MS = 86_400_000

_OTHER_UNITS = {"seconds": 1000.0, "microseconds": 1e-3, "nanoseconds": 1e-6}  # unit → milliseconds in one

_REPR = reprlib.Repr()
_REPR.maxlevel = 2
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60


@dataclass(frozen=True, slots=True)
class Problem:
    """Why an event is refused.

    Attributes:
        code: Short and stable, for counters.
        reason: For people: what was expected and what the event had; at most a few hundred characters.
        field: Dotted name of the field at fault, None where it is the event as a whole.
    """

    code: Code
    reason: str
    field: str | None = None


@dataclass(frozen=True, slots=True)
class TimeBounds:
    """Which event times are believed.

    An event's own time is what counts. It is compared with two clocks, the producer's, which stamped the record's
    arrival, and the reader's, so that one clock that is off loses nothing. The reader's clock alone bounds both: a
    producer whose clock is broken cannot bring events from next year.

    Attributes:
        max_future_ms: How far an event may lie after the later of its record's arrival and ``now_ms``.
        now_ms: The reader's clock, Unix milliseconds.
    """

    max_future_ms: int
    now_ms: int

    @property
    def latest_ms(self) -> int:
        """No event is later than a day after the reader's clock, whatever its record's arrival."""
        return min(self.now_ms + DAY_MS, MAX_ID)

    def bad(self, event_time_ms: I64, arrival_ms: I64) -> Bool:
        """Rows whose time is not believed. int64 [N] → bool [N]."""
        # Each is at most a day after now before it is used in a sum, so nothing overflows.
        limit_ms = np.clip(arrival_ms, self.now_ms, self.latest_ms) + min(self.max_future_ms, DAY_MS)
        bad: Bool = (event_time_ms < EARLIEST_MS) | (event_time_ms > np.minimum(limit_ms, self.latest_ms))
        return bad

    def problem(self, event_time_ms: int, arrival_ms: int, name: str) -> Problem | None:
        """What :meth:`bad` finds wrong with one time, in words."""
        if not EARLIEST_MS <= event_time_ms <= self.latest_ms:
            return Problem("bad_time", f"{name}: expected {self._expected()}, {self._got(event_time_ms)}", name)
        later_ms = max(arrival_ms, self.now_ms)
        if event_time_ms - later_ms <= self.max_future_ms:
            return None
        reason = (
            f"{name}: expected at most {self.max_future_ms} ms after the record's arrival at {arrival_ms} or the "
            f"reader's clock at {self.now_ms}, got {event_time_ms}, {event_time_ms - later_ms} ms after the later one"
        )
        return Problem("future_time", reason, name)

    def _expected(self) -> str:
        return f"Unix milliseconds from {EARLIEST_MS} (2000-01-01) to {self.latest_ms} (the reader's clock + 1 day)"

    def _got(self, value: int) -> str:
        for unit, factor in _OTHER_UNITS.items():
            if EARLIEST_MS <= value * factor <= self.latest_ms:
                return f"got {value}, which looks like {unit}"
        return f"got {value}"


def quoted(value: object) -> str:
    """``value`` as a reason quotes it: its representation, cut to about 60 characters."""
    return _REPR.repr(value)


def bad_labels(task: I32, value: NDArray[np.float32] | NDArray[np.float64], schema: Schema) -> Bool:
    """Rows whose label is outside its task's range, bool [N]; rows of an unknown task (index -1) are not judged.

    Binary labels are compared as they are; the upper bound of a regression label is compared as float32, so that a
    ``max_value`` that float32 cannot hold exactly is still reached by a float32 column.
    """
    binary = np.array([t.kind == "binary" for t in schema.tasks])
    highest = np.array([t.max_value for t in schema.tasks], np.float32)
    with np.errstate(over="ignore"):  # beyond float32 becomes inf, which is out of range as it should be
        value_f32 = value.astype(np.float32)
    regression_ok = (value >= 0) & (value_f32 <= highest[task]) & np.isfinite(value_f32)
    ok = np.where(binary[task], (value == 0) | (value == 1), regression_ok)
    bad: Bool = ~ok & (task >= 0)
    return bad


_JSON_NAMES = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}


def impression_problem(
    event: object, schema: Schema, arrival_ms: int, bounds: TimeBounds, given: dict[str, object] | None = None
) -> Problem | None:
    """The first fault of an impression in its JSON form, in the order of the fields; None when there is none.

    Args:
        event: The impression.
        schema: What it must fit.
        arrival_ms: When its record reached the log.
        bounds: Which times are believed.
        given: Good features that it has besides its own: those of its request.
    """
    if not isinstance(event, dict):
        return _no_object(event)
    return (
        _required_id(event, "impression_id")
        or _required_id(event, USER_ID)
        or _required_id(event, ITEM_ID)
        or _time_problem(event, arrival_ms, bounds)
        or _id_problem(event.get("request_id"), "request_id")
        or features_problem(event.get("features"), schema, given=given or {})
        or _served_problem(event.get("served"), schema)
    )


def shared_problem(event: dict[str, object], schema: Schema, arrival_ms: int, bounds: TimeBounds) -> Problem | None:
    """The first fault of what a request has for all of its impressions, in the order of the fields.

    Args:
        event: The request's record in its JSON form; its impressions are passed over.
        schema, arrival_ms, bounds: As of :func:`impression_problem`.
    """
    return (
        _id_problem(event.get(USER_ID), USER_ID)
        or _id_problem(event.get(ITEM_ID), ITEM_ID)
        or (None if event.get("event_time_ms") is None else _time_problem(event, arrival_ms, bounds))
        or _id_problem(event.get("request_id"), "request_id")
        or features_problem(event.get("features"), schema, given=None)
        or _served_problem(event.get("served"), schema)
    )


def feedback_problem(event: object, schema: Schema, arrival_ms: int, bounds: TimeBounds) -> Problem | None:
    """The first fault of a feedback event in its JSON form, in the order of the fields; None when there is none."""
    if not isinstance(event, dict):
        return _no_object(event)
    return (
        _required_id(event, "impression_id")
        or _time_problem(event, arrival_ms, bounds)
        or _task_problem(event, schema)
        or _label_problem(event, schema)
    )


def unknown_impression_fields(schema: Schema) -> Callable[[object], int]:
    """A counter of the fields, at every level, of an impression in its JSON form that the schema does not know."""
    top = {"impression_id", USER_ID, ITEM_ID, "event_time_ms", "request_id", "features", "served"}
    names = {f.name for f in schema.features} - {USER_ID, ITEM_ID}
    tasks = schema.task_index.keys()

    def count(event: object) -> int:
        if not isinstance(event, dict):
            return 0
        served = event.get("served")
        unknown = _extra_keys(event, top) + _extra_keys(event.get("features"), names)
        if isinstance(served, dict):
            unknown += _extra_keys(served, {"arm", "version", "scores"}) + _extra_keys(served.get("scores"), tasks)
        return unknown

    return count


def unknown_feedback_fields(event: object) -> int:
    """How many fields of a feedback event in its JSON form are not part of one."""
    return _extra_keys(event, {"impression_id", "event_time_ms", "task", "value"})


def _extra_keys(value: object, known: AbstractSet[str]) -> int:
    return len(value.keys() - known) if isinstance(value, dict) else 0


def _no_object(event: object) -> Problem:
    return Problem("unparsable", f"expected a JSON object, got {_JSON_NAMES.get(type(event), 'a number')}")


def _missing(event: dict[str, object], name: str, expected: str) -> Problem | None:
    if event.get(name) is not None:
        return None
    return Problem("missing_field", f"{name}: expected {expected}, got {'null' if name in event else 'nothing'}", name)


def _required_id(event: dict[str, object], name: str) -> Problem | None:
    return _missing(event, name, "an integer") or _id_problem(event[name], name)


def _id_problem(value: object, name: str) -> Problem | None:
    if value is None:
        return None
    if type(value) is not int:
        return Problem("bad_id", f"{name}: expected an integer, got {quoted(value)}", name)
    if not MIN_ID <= value <= MAX_ID:
        what = "the null sentinel " if value == MISSING else ""
        return Problem("bad_id", f"{name}: expected {MIN_ID} … {MAX_ID}, got {what}{quoted(value)}", name)
    return None


def _time_problem(event: dict[str, object], arrival_ms: int, bounds: TimeBounds) -> Problem | None:
    name = "event_time_ms"
    missing = _missing(event, name, "Unix milliseconds")
    if missing:
        return missing
    value = event[name]
    if type(value) is not int or not MIN_ID <= value <= MAX_ID:
        return Problem("bad_time", f"{name}: expected integer Unix milliseconds, got {quoted(value)}", name)
    return bounds.problem(value, arrival_ms, name)


def _number_problem(value: object, name: str) -> Problem | None:
    if value is None or (type(value) in (int, float) and -MAX_FLOAT <= value <= MAX_FLOAT):  # type: ignore[operator]
        return None
    return Problem("bad_number", f"{name}: expected a finite number (float32), got {quoted(value)}", name)


_NONE: dict[str, object] = {}


def features_problem(
    features: object, schema: Schema, where: str = "features", *, given: dict[str, object] | None = _NONE
) -> Problem | None:
    """The first fault of features in their JSON form, in the order of the schema; None when there is none.

    Args:
        features: Name of a feature → value.
        schema: What they must fit.
        where: What holds them, for the names of fields.
        given: Good features beside them, which sequences may accompany; None: others come, so lengths are not compared.
    """
    if features is None:
        features = {}
    if not isinstance(features, dict):
        return Problem("bad_type", f"{where}: expected an object, got {quoted(features)}", where)
    for feature in schema.features:
        if feature.name not in (USER_ID, ITEM_ID):
            problem = _feature_problem(features.get(feature.name), feature, where)
            if problem:
                return problem
    return None if given is None else _alignment_problem(features, given, schema, where)


def _alignment_problem(
    features: dict[str, object], given: dict[str, object], schema: Schema, holder: str
) -> Problem | None:
    """Lengths are compared as kept: what lies beyond ``max_length`` is cut of both."""
    for name, companions in schema.companions.items():
        for feature in companions:
            values = [features.get(each) or given.get(each) or () for each in (name, feature.name)]
            expected, got = map(len, values)  # type: ignore[arg-type]  # lists, or refused before
            if min(expected, feature.max_length) != min(got, feature.max_length):
                where = f"{holder}.{feature.name}"
                reason = f"{where}: expected as many ids as {holder}.{name} has, {expected}, got {got}"
                return Problem("misaligned", reason, where)
    return None


def _feature_problem(value: object, feature: Feature, where: str) -> Problem | None:
    name = f"{where}.{feature.name}"
    if feature.kind == "numeric":
        return _number_problem(value, name)
    if feature.kind == "id" or value is None:
        return _id_problem(value, name)
    if not isinstance(value, list):
        return Problem("bad_type", f"{name}: expected an array of integers, got {quoted(value)}", name)
    for position, element in enumerate(value):
        if element is None:
            return Problem("bad_id", f"{name}: expected an integer at position {position}, got null", name)
        problem = _id_problem(element, name)
        if problem:
            return problem
    return None


def _served_problem(served: object, schema: Schema) -> Problem | None:
    if served is None:
        return None
    if not isinstance(served, dict):
        return Problem("bad_type", f"served: expected an object, got {quoted(served)}", "served")
    problem = _id_problem(served.get("version"), "served.version") or _arm_problem(served.get("arm"))
    scores = served.get("scores")
    if problem or scores is None:
        return problem
    if not isinstance(scores, dict):
        return Problem("bad_type", f"served.scores: expected a score per task, got {quoted(scores)}", "served.scores")
    for task in schema.tasks:
        problem = _number_problem(scores.get(task.name), f"served.scores.{task.name}")
        if problem:
            return problem
    return None


def _arm_problem(arm: object) -> Problem | None:
    if arm is None or (isinstance(arm, str) and is_arm_name(arm)):
        return None
    return Problem("bad_type", f"served.arm: expected {EXPECTED}, got {quoted(arm)}", "served.arm")


def _task_problem(event: dict[str, object], schema: Schema) -> Problem | None:
    missing = _missing(event, "task", "the name of a task")
    if missing:
        return missing
    name = event["task"]
    if isinstance(name, str) and name in schema.task_index:
        return None
    known = ", ".join(t.name for t in schema.tasks[:8]) + (", …" if len(schema.tasks) > 8 else "")
    return Problem("unknown_task", f"task: expected one of {known}, got {quoted(name)}", "task")


def _label_problem(event: dict[str, object], schema: Schema) -> Problem | None:
    missing = _missing(event, "value", "a label")
    if missing:
        return missing
    value, name = event["value"], event["task"]
    task = schema.tasks[schema.task_index[str(name)]]
    if type(value) in (int, float) and _in_range(float(value), task, schema):  # type: ignore[arg-type]
        return None
    expected = "0 or 1" if task.kind == "binary" else f"0 … {task.max_value:g}"
    return Problem("label_range", f"value: expected {expected} for task {task.name!r}, got {quoted(value)}", "value")


def _in_range(value: float, task: Task, schema: Schema) -> bool:
    index = np.array([schema.task_index[task.name]], np.int32)
    return not bad_labels(index, np.array([value]), schema)[0]
