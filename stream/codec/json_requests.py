"""Records in JSON to the structs of impressions, of one or of several to a record (:mod:`stream.codec.requests`)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from smes.arrays import I64, Bool
from smes.schema import Schema
from stream.codec.json_refused import REFUSED, parse, refuse, unexplained
from stream.codec.json_structs import Wire
from stream.codec.limits import max_rows
from stream.codec.requests import (
    IMPRESSIONS,
    conflict,
    given_of,
    impressions_problem,
    is_request,
    shown_problem,
)
from stream.codec.validation import Problem, TimeBounds, impression_problem, shared_problem
from stream.dead_letters import DeadLetter, row_payload_bytes
from stream.log.event_log import Record
from stream.topics import IMPRESSIONS as TOPIC

_HINT = f'"{IMPRESSIONS}"'.encode()  # which decoder to try first; what it holds, the decoders say


@dataclass(frozen=True, slots=True)
class Request:
    """A record of several impressions.

    Attributes:
        start: Of its first impression, among all that were read.
        places: Of its impressions within the record; those between were refused.
        given: Struct of what they share; more fields may follow.
    """

    start: int
    places: Sequence[int]
    given: Any


@dataclass(slots=True)
class Impressions:
    """Structs of impressions, N of them.

    Attributes:
        events: In the order of their records.
        records: The record of each.
        surplus: Number of the event → how many of its fields, or of its request's, the schema does not know.
        requests: Records of several impressions.
    """

    events: list[Any] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    surplus: dict[int, int] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)

    def of_request(self) -> I64:
        """The number of each impression's request, -1 where it has none. int64 [N]."""
        of_N = np.full(len(self.events), -1, np.int64)
        for number, request in enumerate(self.requests):
            of_N[request.start : request.start + len(request.places)] = number
        return of_N


class Reader:
    """Reads records of impressions.

    Args:
        wire: The schema's decoders.
        schema: What the impressions must fit.
        bounds: Which times are believed.
        dead: Gets the letters of what cannot be read.
    """

    def __init__(self, wire: Wire, schema: Schema, bounds: TimeBounds, dead: list[DeadLetter]) -> None:
        self._wire, self._schema, self._bounds, self._dead = wire, schema, bounds, dead
        self._out = Impressions()

    def read(self, records: Sequence[Record]) -> Impressions:
        """What the records hold, but for what cannot be read."""
        out, strict, strict_request = self._out, self._wire.strict.decode, self._wire.strict_request.decode
        for record in records:
            if _HINT in record.value:
                try:
                    request: Any = strict_request(record.value)
                except REFUSED:
                    pass  # an impression with a feature of that name, or not as the schema describes it
                else:
                    self._add(record, request, range(len(request.impressions)), request.impressions)
                    continue
            try:
                out.events.append(strict(record.value))
            except REFUSED:
                self._read_slowly(record)
            else:
                out.records.append(record)
        return out

    def _add(self, record: Record, given: Any, places: Sequence[int], shown: Sequence[Any]) -> None:
        self._out.requests.append(Request(len(self._out.events), places, given))
        self._out.events += shown
        self._out.records += [record] * len(shown)

    def _read_slowly(self, record: Record) -> None:
        """A record with a fault, or with fields that the schema does not know."""
        out, wire = self._out, self._wire
        try:
            plain = parse(record.value)
            if is_request(plain):
                self._read_request(record, plain)  # type: ignore[arg-type]  # a dict, as it says
                return
            event = wire.lenient.decode(record.value)
        except (*REFUSED, ValueError) as error:
            refuse(record, self._schema, self._bounds, impression_problem, self._dead, error)
            return
        out.surplus[len(out.events)] = wire.count_unknown(plain)
        out.events.append(event)
        out.records.append(record)

    def _read_request(self, record: Record, event: dict[str, Any]) -> None:
        out, wire, schema, bounds = self._out, self._wire, self._schema, self._bounds
        given, shown = given_of(event), event[IMPRESSIONS]
        problem = impressions_problem(event, max_rows(schema))
        problem = problem or shared_problem(given, schema, record.arrival_ms, bounds)
        if problem is None:
            try:
                given_struct = msgspec.convert(given, wire.given)
            except REFUSED as error:
                problem = unexplained(error)
        if problem is not None:
            events = len(shown) if isinstance(shown, list) else 1
            self._dead.append(DeadLetter.of_record(record, problem, events=max(1, events)))
            return
        good: dict[int, Any] = {}
        bad: dict[int, Problem] = {}
        unknown = wire.count_unknown(given)
        for place, each in enumerate(shown):
            problem = shown_problem(each, given, schema, record.arrival_ms, bounds)
            if problem is None:
                try:
                    good[place] = msgspec.convert(each, wire.shown)
                except REFUSED as error:
                    problem = unexplained(error)
            if problem is not None:
                bad[place] = problem
        for number, place in enumerate(good, len(out.events)):
            out.surplus[number] = unknown + wire.count_unknown(shown[place])
        if good:
            self._add(record, given_struct, list(good), list(good.values()))
        self._dead += _letters(record, bad)

    def refuse_rows(self, bad: Bool, conflicts: Mapping[int, str]) -> None:
        """Write the letters of impressions that were read, but that are not good.

        Args:
            bad: Which, bool [N].
            conflicts: Their number → the field of which their request has another value.
        """
        alone = bad.copy()
        for request in self._out.requests:
            rows = slice(request.start, request.start + len(request.places))
            alone[rows] = False
            if bad[rows].any():
                of_bad = np.flatnonzero(bad[rows]).tolist()
                fields = {request.places[i]: conflicts.get(request.start + i) for i in of_bad}
                self._refuse_shown(self._out.records[request.start], fields)
        for number in np.flatnonzero(alone).tolist():
            refuse(self._out.records[number], self._schema, self._bounds, impression_problem, self._dead)

    def _refuse_shown(self, record: Record, fields: Mapping[int, str | None]) -> None:
        """Write the letters of impressions of one record; one letter if what they share is at fault.

        Args:
            record: The record.
            fields: Their places → the field of which their request has another value.
        """
        event: Any = parse(record.value)
        given = given_of(event)
        shared = shared_problem(given, self._schema, record.arrival_ms, self._bounds)
        if shared is not None:
            self._dead.append(DeadLetter.of_record(record, shared, events=len(fields)))
            return
        problems = {}
        for place, name in fields.items():
            shown = event[IMPRESSIONS][place]
            problem = shown_problem(shown, given, self._schema, record.arrival_ms, self._bounds)
            problems[place] = problem or (unexplained() if name is None else conflict(name))
        self._dead += _letters(record, problems)


def may_be_request(record: Record) -> bool:
    """Whether a record in JSON may hold several impressions; no record of whom this says no does."""
    return record.topic == TOPIC and (
        _HINT in record.value or b"\\" in record.value
    )  # a name may be written in escapes


def single_impression(value: bytes, place: int) -> bytes:
    """A record of several impressions with one of them alone.

    Raises:
        ValueError: It is no such record, or does not have so many.
    """
    try:
        given, shown = _split(value)
        return _one(given, shown[place])
    except (*REFUSED, KeyError, IndexError) as error:
        raise ValueError(f"expected a record of more than {place} impressions: {error}") from error


def _letters(record: Record, problems: Mapping[int, Problem]) -> Iterator[DeadLetter]:
    """The letters of impressions of a record, by their places. Each has its impression, and what it shares with others.

    All letters of a record together take at most a few times its size.
    """
    if not problems:
        return
    most = row_payload_bytes(record, len(problems))
    try:
        given, shown = _split(record.value)
    except REFUSED:  # nested almost too deeply, or with NaN for a number
        for place, problem in problems.items():
            yield DeadLetter.of_row(record, place, problem, record.value[:most], is_excerpt=True)
        return
    given = given[: most + 1]
    for place, problem in problems.items():
        payload = _one(given, shown[place])
        yield DeadLetter.of_row(record, place, problem, payload[:most], is_excerpt=len(payload) > most)


def _split(value: bytes) -> tuple[bytes, list[msgspec.Raw]]:
    """What the impressions of a record share, as JSON, and each of them, byte for byte."""
    fields = msgspec.json.decode(value, type=dict[str, msgspec.Raw])
    return msgspec.json.encode(given_of(fields)), msgspec.json.decode(fields[IMPRESSIONS], type=list[msgspec.Raw])


def _one(given: bytes, shown: msgspec.Raw) -> bytes:
    """The JSON of a request with one impression, which stands first: a letter may have to be cut."""
    return b'{"impressions":[' + bytes(shown) + (b"]," if len(given) > 2 else b"]") + given[1:]
