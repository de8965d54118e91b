"""Read YAML files into plain frozen dataclasses.

Unknown keys are refused at every level. Every error is one line that names the file, the key, the value and what was
expected, in the words of :mod:`smes.ranges`. A value that may hold a password is shown without it.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from smes.ranges import expected
from smes_io.secrets import shown

_T = TypeVar("_T")
STRICT = ConfigDict(extra="forbid")
"""``__pydantic_config__`` of a file's outermost dataclass. Pydantic applies it to the nested ones too."""

_UNKNOWN_KEY = ("unexpected_keyword_argument", "extra_forbidden")
_MISSING_KEY = ("missing", "missing_argument")
_OUT_OF_RANGE = (
    "greater_than_equal",
    "greater_than",
    "less_than_equal",
    "less_than",
    "multiple_of",
    "too_short",
    "too_long",
    "literal_error",
)
_ADAPTERS: dict[type, TypeAdapter[Any]] = {}
_TYPE_NAMES: Mapping[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    tuple: "a list",
    list: "a list",
    dict: "a mapping",
}


def read_mapping(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file. An empty file is an empty mapping.

    Raises:
        ValueError: The file cannot be read, or is not a YAML mapping.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: expected a readable file ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected YAML ({_parse_error(error)})") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a mapping of keys to values, got {type(data).__name__}")
    return data


def _parse_error(error: Exception) -> str:
    """What the parser says, without the lines of the file that it quotes: they may hold a password."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def validated(
    cls: type[_T], data: Mapping[str, Any], where: str | Path, also: Mapping[str, tuple[str, ...]] | None = None
) -> _T:
    """Build a frozen dataclass whose ``__pydantic_config__`` is :data:`STRICT` from plain data.

    Args:
        cls: The dataclass.
        data: As read from the file.
        where: Start of the error message, such as the file's path.
        also: Section → keys that the file may have there and that are no fields; messages list them.

    Raises:
        ValueError: An entry is missing, unknown, of a wrong type or out of range.
    """
    for place, hint, value in _confused(cls, data, ()):
        key = _dotted(place)
        raise ValueError(f"{where}: {key}: {shown(key, value)}, expected {_type_words(hint)}")
    try:
        return _adapter(cls).validate_python(data)
    except ValidationError as error:
        raise ValueError(f"{where}: {_one_line(cls, error, also or {})}") from error


def _adapter(cls: type[_T]) -> TypeAdapter[_T]:
    """Made once for each class: that takes longer than to read a file by it."""
    if cls not in _ADAPTERS:
        _ADAPTERS[cls] = TypeAdapter(cls)
    return _ADAPTERS[cls]


def _confused(
    hint: Any, value: Any, place: tuple[int | str, ...]
) -> Iterator[tuple[tuple[int | str, ...], Any, bool | int | float]]:
    """Booleans where a number is expected and numbers where a boolean is, which pydantic would take for each other."""
    if isinstance(value, bool | int | float):
        kinds = set(_leaves(hint))
        if kinds & {bool, int, float} and not kinds & ({bool} if isinstance(value, bool) else {int, float}):
            yield place, hint, value
        return
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for part, below in parts:
        below_hint = _below(hint, part)
        if below_hint is not None:
            yield from _confused(below_hint, below, (*place, part))


def _leaves(hint: Any) -> Iterator[Any]:
    """The types that a scalar may have by an annotation."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        yield from _leaves(arguments[0])
    elif origin in (Union, UnionType):
        for branch in arguments:
            yield from _leaves(branch)
    elif origin is Literal:
        yield from map(type, arguments)
    else:
        yield hint


def _one_line(cls: type, error: ValidationError, also: Mapping[str, tuple[str, ...]]) -> str:
    """Describe the first mistake, and say how many more there are."""
    mistakes = error.errors(include_url=False)
    others = len({_place(cls, mistake["loc"])[1] for mistake in mistakes}) - 1  # a union reports each of its branches
    return _describe(cls, mistakes[0], also) + (f" (and {others} more)" if others else "")


def _describe(cls: type, mistake: Any, also: Mapping[str, tuple[str, ...]]) -> str:
    kind, value = mistake["type"], mistake["input"]
    if kind in _UNKNOWN_KEY:
        section = mistake["loc"][:-1]
        allowed = ", ".join([*also.get(_dotted(section), ()), *_keys(_place(cls, section)[0])])
        key = _dotted(mistake["loc"])
        return f"{key}: {shown(key, value)} is an unknown key, expected one of {allowed}"
    if kind in _MISSING_KEY:
        return f"{_dotted(mistake['loc'])}: missing, expected a value"
    hint, place = _place(cls, mistake["loc"])
    key = _dotted(place)
    if kind == "value_error":
        return _under(key, hint, str(mistake["ctx"]["error"]))
    if kind in _OUT_OF_RANGE and expected(hint):
        return f"{key}: {shown(key, value)}, expected {expected(hint)}"
    more = f"{', '.join(also[key])}, " if key in also else ""
    return f"{key}: {shown(key, value)}, expected {_type_words(hint, more)}"


def _under(key: str, cls: Any, message: str) -> str:
    """A dataclass's own message under its key in the file: ``ClassName.field: …`` becomes ``key.field: …``."""
    own = re.match(rf"{getattr(cls, '__name__', '')}\.(?=\w+(\.\w+)*: )", message)
    if not key:
        return message[own.end() :] if own else message
    return f"{key}.{message[own.end() :]}" if own else f"{key}: {message}"


def _place(cls: Any, loc: tuple[int | str, ...]) -> tuple[Any, tuple[int | str, ...]]:
    """Follow a mistake's location as far as it names keys; pydantic appends the branch of a union to it.

    Returns:
        The annotation found there, and the part of the location that names keys.
    """
    hint = cls
    for depth, part in enumerate(loc):
        below = _below(hint, part)
        if below is None:
            return hint, loc[:depth]
        hint = below
    return hint, loc


def _below(hint: Any, part: int | str) -> Any:
    """The annotation of one key or element, or None if there is no such key."""
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return get_type_hints(hint, include_extras=True).get(str(part))
    if origin is Annotated:
        return _below(arguments[0], part)
    if origin in (Union, UnionType):
        return next((found for branch in arguments if (found := _below(branch, part)) is not None), None)
    if origin is dict:
        return arguments[1]
    if origin in (tuple, list) and isinstance(part, int):
        return arguments[part] if len(arguments) > part and Ellipsis not in arguments else arguments[0]
    return None


def _keys(hint: Any) -> list[str]:
    """The keys of a dataclass, also of the one in ``X | None``."""
    if is_dataclass(hint):
        return [f.name for f in fields(hint)]
    return next((keys for branch in get_args(hint) if (keys := _keys(branch))), [])


def _type_words(hint: Any, more_keys: str = "") -> str:
    """An annotation in words: its type, then its range."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return ", ".join(part for part in (_type_words(arguments[0]), expected(hint)) if part)
    if origin is Literal:
        return expected(hint)
    if origin in (Union, UnionType):
        words = " or ".join(_type_words(branch) for branch in arguments if branch is not NoneType)
        return f"{words}, or null" if NoneType in arguments else words
    if is_dataclass(hint):
        return f"a mapping with the keys {more_keys}{', '.join(_keys(hint))}"
    words = _TYPE_NAMES.get(origin or hint, "a value of another type")
    return f"{words}, {expected(hint)}" if expected(hint) else words


def _dotted(place: tuple[int | str, ...]) -> str:
    return ".".join(map(str, place))
