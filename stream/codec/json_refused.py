"""Why a record in JSON is refused: looked at again, as plain data."""

import json
from collections.abc import Callable

import msgspec

from smes.schema import Schema
from stream.codec.validation import Problem, TimeBounds
from stream.dead_letters import DeadLetter
from stream.log.event_log import Record

REFUSED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding a record's bytes may raise: msgspec's own, plus strings that are no UTF-8 and nesting without end."""

Explain = Callable[[object, Schema, int, TimeBounds], Problem | None]


def parse(value: bytes) -> object:
    """A record's JSON as plain data.

    Raises:
        msgspec.MsgspecError, ValueError, RecursionError: It is no JSON, or nested too deeply.
    """
    try:
        return msgspec.json.decode(value)
    except msgspec.ValidationError:  # well-formed, but a number is beyond float64: let it be inf
        return json.loads(value, parse_int=_bounded_int)


def _bounded_int(digits: str) -> int | float:
    # Python refuses to convert integers of more than 4300 digits, for they take quadratic time.
    return int(digits) if len(digits) <= 4000 else float("inf")


def refuse(
    record: Record,
    schema: Schema,
    bounds: TimeBounds,
    explain: Explain,
    dead: list[DeadLetter],
    error: Exception | None = None,
) -> None:
    """Write the letter of a record that was refused; ``error`` is what its decoder raised."""
    try:
        problem = explain(parse(record.value), schema, record.arrival_ms, bounds)
    except (*REFUSED, ValueError) as not_json:
        problem = Problem("unparsable", f"expected a JSON object: {str(not_json)[:200]}")
    # Without a problem only the decoder knows: a repeated key, say, whose first value is bad and whose last is good.
    problem = problem or unexplained(error)
    dead.append(DeadLetter.of_record(record, problem))


def unexplained(error: Exception | None = None) -> Problem:
    """What was refused, without a fault that is known; ``error`` is what its decoder raised."""
    return Problem("unparsable", f"expected an event as the schema describes it: {str(error)[:200]}")
