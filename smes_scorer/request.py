"""The scoring request: its JSON form, which is made from the schema, and its way into the feature matrices.

A request::

    {"user_id": 7, "items": [13, "a-17"], "context": {"hour": 20, "tags": ["new", 5], "battery": 0.5},
     "top_k": 1, "tasks": ["click"]}

An id is an integer or a text, of which :func:`smes.hashing.encode_id` makes the integer, as readers and producers do.
``context`` and each of its values may be left out; a value may be null, and an empty text is none either. A name in
``context`` that is no context feature of the schema is ignored and counted. ``top_k`` and ``tasks`` say how much is
answered; without them, all is.

msgspec decodes a good request in one pass into a struct with one typed field per context feature. A request that it
refuses is parsed again with the standard library. Either it is good but has names to ignore, or JSON that only the
standard library reads (NaN in an ignored value, UTF-16); or it is wrong, and the answer says where and why.

A body of more than 32 KiB that msgspec refuses is not parsed by the standard library, which would make an object of
each of its values. It may have names to ignore, but must be JSON in UTF-8; and the answer says where it is wrong, and
what was expected there, but not what it has. Only the first mistake is named, in a few words, whatever the body.
"""

import json
import re
import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import msgspec
import numpy as np

from feature_store.entities import EntityRows
from smes.arrays import I64
from smes.hashing import encode_id
from smes.schema import MISSING, Schema
from smes_scorer.request_struct import LARGEST_ID, request_struct

_LONGEST_EXPLAINED = 32 * 1024  # bytes of a body
_LONGEST_SHOWN = 100  # characters of a name or of msgspec's words

_QUOTE, _BACKSLASH = ord('"'), ord("\\")
_OPENING, _CLOSING = np.frombuffer(b"[{", np.uint8), np.frombuffer(b"]}", np.uint8)
_FIELDS = ("user_id", "items", "context", "top_k", "tasks")
_REQUIRED = ("user_id", "items")


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """A valid request.

    Attributes:
        user_id: The user.
        items: The candidate items as they were asked for, at least one.
        item_ids: int64 [N], their ids.
        ids: Column of the ids matrix → values from that column on: the id, bag and sequence features of the context.
        numerics: Column of the numerics matrix → value: the numeric features of the context.
        ignored_context: How many names of the context are no context feature.
        top_k: How many of the best items are answered, 1 or more; None: all.
        tasks: The tasks whose scores are answered, as their places in the schema; None: all.
    """

    user_id: int
    items: list[int | str]
    item_ids: I64
    ids: Mapping[int, Sequence[int]]
    numerics: Mapping[int, float]
    ignored_context: int = 0
    top_k: int | None = None
    tasks: tuple[int, ...] | None = None

    def write_context(self, rows: EntityRows) -> None:
        """Write the context features into every row."""
        for column, values in self.ids.items():
            rows.ids[:, column : column + len(values)] = values
        for column, number in self.numerics.items():
            rows.numerics[:, column] = number


class FieldError(ValueError):
    """One field of a request is wrong.

    Attributes:
        loc: Where, as in the answers of FastAPI: ``("body", "context", "hour")``.
        kind: FastAPI's ``type``: ``missing``, ``extra_forbidden``, ``json_invalid`` or ``value_error``.
    """

    def __init__(self, loc: tuple[str | int, ...], message: str, kind: str = "value_error") -> None:
        super().__init__(message)
        self.loc = loc
        self.kind = kind


class UnreadableBody(ValueError):
    """The body cannot be parsed, but not because of its syntax: its encoding, its nesting or the size of a number."""


class RequestReader:
    """Reads requests for one schema. Safe to share between threads.

    Args:
        schema: Features of a request.
        max_items: Most items of a request.
        max_depth: How deep the lists and objects of a body may be nested, at least 3.
    """

    def __init__(self, schema: Schema, max_items: int, max_depth: int = 32) -> None:
        self._max_items, self._max_depth = max_items, max_depth
        self._features = [f for f in schema.features if f.source == "context"]
        self._names = {f.name for f in self._features}
        self._tasks = schema.task_index
        self._columns = [
            schema.numeric_features.index(f) if f.kind == "numeric" else schema.id_slices[f.name].start
            for f in self._features
        ]
        index = {f.name: i for i, f in enumerate(self._features)}
        self._companions = [
            (index[name], index[companion.name])
            for name, companions in schema.companions.items()
            for companion in companions
            if name in index
        ]
        self.struct = request_struct(self._features, list(self._tasks), max_items)
        """The struct of a request, from which its JSON schema is made."""
        self._decoder = msgspec.json.Decoder(self.struct)
        ignoring = request_struct(self._features, list(self._tasks), max_items, ignoring=True)
        self._ignoring_decoder = msgspec.json.Decoder(ignoring)

    def read(self, body: bytes) -> ScoreRequest:
        """Parse and check a request.

        Raises:
            FieldError: A field is missing, unknown, of the wrong type or out of range.
            UnreadableBody: The body cannot be parsed.
        """
        try:
            return self._checked(self._decoder.decode(body))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            self._check_depth(body)  # a good request without names to ignore is no deeper than 3
            return self._read_large(body) if len(body) > _LONGEST_EXPLAINED else self._read_slowly(body)

    def _check_depth(self, body: bytes) -> None:
        """Refuse a body that is nested too deep, before anything is made of it."""
        if body.count(b"[") + body.count(b"{") <= self._max_depth:
            return
        encoding = json.detect_encoding(body)
        if encoding != "utf-8" and len(body) <= _LONGEST_EXPLAINED:
            body = body.decode(encoding, "replace").encode("utf-8", "replace")
        if (depth := nested(body)) > self._max_depth:
            raise UnreadableBody(f"body: nested {depth} deep, expected at most {self._max_depth} (max_depth)")

    def _read_slowly(self, body: bytes) -> ScoreRequest:
        """Take out the names to ignore and try again, or say what is wrong."""
        data, ignored = self._without_ignored(_parse(body))
        try:
            request = msgspec.convert(data, self.struct)
        except (msgspec.ValidationError, UnicodeEncodeError) as error:  # the latter: a name with half a surrogate pair
            raise self._explained(data, error) from error
        return self._checked(request, ignored)

    def _read_large(self, body: bytes) -> ScoreRequest:
        """The same without an object for each value of the body."""
        try:
            values = _RAW_VALUES.decode(body)
            context = values.get("context", msgspec.Raw(b"{}"))
            try:
                request = self._ignoring_decoder.decode(body)
            except msgspec.ValidationError as error:
                raise self._explained_briefly(values, error) from error
            return self._checked(request, len(_RAW_VALUES.decode(context).keys() - self._names))
        except msgspec.ValidationError as error:
            raise FieldError(("body",), "expected an object with user_id and items") from error
        except msgspec.DecodeError as error:
            raise FieldError(("body",), f"no JSON: {_shortened(str(error))}", "json_invalid") from error
        except UnicodeDecodeError as error:
            raise UnreadableBody(f"body: {error}, expected text in UTF-8") from error
        except RecursionError as error:
            raise UnreadableBody("body: nested too deeply, expected a request") from error

    def _without_ignored(self, data: object) -> tuple[object, int]:
        """The data without the names of its context that are no context feature, and how many those were."""
        context = data.get("context") if isinstance(data, dict) else None
        if not isinstance(data, dict) or not isinstance(context, dict):
            return data, 0
        known = {name: value for name, value in context.items() if name in self._names}
        return {**data, "context": known}, len(context) - len(known)

    def _checked(self, request: Any, ignored: int = 0) -> ScoreRequest:
        """Check what lies between fields, and sort the context's values by matrix and column."""
        if len(request.items) > self._max_items:
            raise FieldError(("body", "items"), f"{len(request.items)} items, expected at most {self._max_items}")
        values = msgspec.structs.astuple(request.context)
        for sequence, companion in self._companions:
            expected, got = len(values[sequence] or ()), len(values[companion] or ())
            if got != expected:
                name = self._features[sequence].name
                message = f"expected as many ids as {name!r} has, {expected}, got {got}"
                raise FieldError(("body", "context", self._features[companion].name), message)
        ids: dict[int, list[int]] = {}
        numerics: dict[int, float] = {}
        for feature, column, value in zip(self._features, self._columns, values, strict=True):
            if value is None or value == "":
                continue
            if feature.kind == "numeric":
                numerics[column] = value
            else:
                loc = ("body", "context", feature.name)
                ids[column] = _encoded(value[: feature.max_length], *loc) if feature.is_list else [_id(value, *loc)]
        item_ids = np.array(_encoded(request.items, "body", "items"), np.int64)
        user_id, tasks = _id(request.user_id, "body", "user_id"), self._chosen(request.tasks)
        return ScoreRequest(user_id, request.items, item_ids, ids, numerics, ignored, request.top_k, tasks)

    def _chosen(self, names: list[str] | None) -> tuple[int, ...] | None:
        """The places of tasks in the schema."""
        if names is None:
            return None
        for place, name in enumerate(names):
            if name in names[:place]:
                raise FieldError(("body", "tasks", place), f"expected each task once, got {_quoted(name)} again")
        return tuple(self._tasks[name] for name in names)

    def _explained(self, data: object, error: Exception) -> FieldError:
        """What is wrong with data that msgspec refused, in the words of a caller who knows only JSON."""
        if not isinstance(data, dict):
            return FieldError(("body",), f"expected an object with user_id and items, got {_quoted(data)}")
        path = self._path(str(error))
        if (wrong := _wrong_name(data)) or not path:
            return wrong or FieldError(("body",), f"no valid request: {_shortened(str(error))}")
        value: Any = data
        for step in path:
            value = value[step]
        return FieldError(("body", *path), f"expected {self._expected(path, value)}, got {_quoted(value)}")

    def _explained_briefly(self, names: Collection[str], error: Exception) -> FieldError:
        """The same without the value, of which only the place is known."""
        path = self._path(str(error))
        if (wrong := _wrong_name(names)) or not path:
            return wrong or FieldError(("body",), f"no valid request: {_shortened(str(error))}")
        return FieldError(("body", *path), f"expected {self._expected(path, None)}")

    def _path(self, message: str) -> tuple[str | int, ...]:
        """The keys in msgspec's ``Expected … - at `$.context.tags[1]```: ``("context", "tags", 1)``."""
        path = message.partition(" - at `$.")[2].removesuffix("`")
        if path.startswith("context."):
            return ("context", *_indexed(path.removeprefix("context."), self._names))
        return _indexed(path, _FIELDS)

    def _expected(self, path: tuple[str | int, ...], value: object) -> str:
        if path == ("context",):
            return "an object: context feature → value"
        if path == ("items",):
            return "a list of integers and texts, at least one"
        if path == ("top_k",):
            return "an integer from 1 on"
        if path[:1] == ("tasks",):
            return f"one of {_shortened(', '.join(self._tasks))}" if len(path) == 2 else "a list of tasks, at least one"
        feature = next((f for f in self._features if path[:2] == ("context", f.name)), None)
        if feature is not None and feature.kind == "numeric":
            return "a finite number"
        if feature is not None and feature.is_list and len(path) == 2:
            return "a list of integers and texts"
        if isinstance(value, int) and not isinstance(value, bool):
            return f"an integer from {MISSING + 1} to {LARGEST_ID}"
        return "a text that is not empty" if value == "" else "an integer or a text"


def _encoded(ids: Sequence[int | str], *loc: str) -> list[int]:
    """The integers of ids at a place."""
    if all(type(value) is int for value in ids):
        return cast("list[int]", ids)
    return [_id(value, *loc, i) for i, value in enumerate(ids)]


def _id(value: int | str, *loc: str | int) -> int:
    """The integer of an id.

    Raises:
        FieldError: It is no Unicode; ``loc`` says where it is.
    """
    try:
        return value if type(value) is int else encode_id(value)
    except ValueError as error:
        raise FieldError(loc, f"expected a text without surrogates, got {_quoted(value)}") from error


_RAW_VALUES = msgspec.json.Decoder(dict[str, msgspec.Raw])
"""Decodes an object without looking into its values."""


def without_tasks(body: bytes) -> bytes:
    """The body of a valid request, without its choice of tasks."""
    try:
        values: Any = _RAW_VALUES.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError):  # what only the standard library reads
        values = json.loads(body)
        values.pop("tasks", None)
        return json.dumps(values).encode()
    values.pop("tasks", None)
    return msgspec.json.encode(values)


def nested(body: bytes) -> int:
    """How deep lists and objects are nested in a JSON text in UTF-8, in a few milliseconds for a megabyte.

    Of what is no JSON, it is the depth up to there or more.
    """
    text_N = np.frombuffer(body, np.uint8)
    quotes = np.flatnonzero(text_N == _QUOTE)
    if b"\\" in body:
        at_N = np.arange(len(text_N))
        other_N = np.maximum.accumulate(np.where(text_N != _BACKSLASH, at_N, -1))  # the last that is no backslash
        quotes = quotes[(quotes == 0) | ((quotes - 1 - other_N[quotes - 1]) % 2 == 0)]
    opens, closes = np.isin(text_N, _OPENING), np.isin(text_N, _CLOSING)
    brackets = np.flatnonzero(opens | closes)
    brackets = brackets[np.searchsorted(quotes, brackets) % 2 == 0]  # those outside of strings
    if len(brackets) == 0:
        return 0
    return max(0, int(np.cumsum(np.where(opens[brackets], 1, -1)).max()))


def _indexed(text: str, names: Collection[str]) -> tuple[str | int, ...]:
    """``tags[1]`` → ``("tags", 1)``, unless a name itself looks like that."""
    if text in names:
        return (text,)
    match = re.fullmatch(r"(.*)\[(\d+)\]", text, re.DOTALL)
    if match is None or match[1] not in names:
        return ()
    return match[1], int(match[2])


def _wrong_name(names: Collection[str]) -> FieldError | None:
    """A field that a request does not have, or that it lacks."""
    for name in names:
        if name not in _FIELDS:
            printable = _shortened(name.encode("utf-8", "backslashreplace").decode())
            return FieldError(("body", printable), f"expected one of {', '.join(_FIELDS)}", "extra_forbidden")
    missing = next((name for name in _REQUIRED if name not in names), None)
    return FieldError(("body", missing), "field required", "missing") if missing else None


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]} …"


def _quoted(value: object) -> str:
    """A value in an error message: short, and as JSON writes it where that differs from Python."""
    return json.dumps(value) if value is None or isinstance(value, bool) else reprlib.repr(value)


def _parse(body: bytes) -> object:
    if not body:
        raise FieldError(("body",), "field required", "missing")
    try:
        return json.loads(body)
    except json.JSONDecodeError as error:
        raise FieldError(("body", error.pos), f"no JSON: {error.msg}", "json_invalid") from error
    except UnicodeDecodeError as error:
        raise UnreadableBody(f"body: {error}, expected text in UTF-8") from error
    except RecursionError as error:
        raise UnreadableBody("body: nested too deeply, expected a request") from error
    except ValueError as error:  # Python converts no integer of thousands of digits, for that takes quadratic time
        raise UnreadableBody("body: an integer of thousands of digits, expected 64 bits") from error
