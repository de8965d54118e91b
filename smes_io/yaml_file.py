"""YAML files into plain frozen dataclasses: unknown keys refused at every level, and every error one line.

The line names the file, the key, the value and what was expected.
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

_T = TypeVar("_T")
STRICT = ConfigDict(extra="forbid")
"""``__pydantic_config__`` of a file's outermost dataclass; pydantic hands it down to those below."""


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        ValueError: It cannot be read, or is no YAML mapping.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: expected a readable file ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected YAML ({' '.join(str(error).split())})") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a mapping of keys to values, got {type(data).__name__}")
    return data


def validated(cls: type[_T], data: Mapping[str, Any], where: str | Path) -> _T:
    """An instance of a frozen dataclass whose ``__pydantic_config__`` is :data:`STRICT`.

    Raises:
        ValueError: An entry is missing, unknown, of a wrong type or out of range; ``where`` leads the message.
    """
    try:
        return TypeAdapter(cls).validate_python(data)
    except ValidationError as error:
        raise ValueError(f"{where}: {_one_line(cls, error)}") from error


def _one_line(cls: type, error: ValidationError) -> str:
    details = error.errors(include_url=False)
    first = details[0]
    key = ".".join(str(part) for part in first["loc"]) or "file"
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        expected = ", ".join(_keys_at(cls, first["loc"][:-1]))
        return f"{key}: {first['input']!r} is an unknown key, expected one of {expected}{more}"
    if first["type"] in ("missing", "missing_argument"):
        return f"{key}: is missing, expected a value{more}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{key}: {message}{more}"
    expected = message[:1].lower() + message[1:]
    return f"{key}: {first['input']!r}, expected otherwise: {expected}{more}"


def _keys_at(cls: Any, loc: tuple[int | str, ...]) -> list[str]:
    """The keys accepted at a place in the file."""
    for part in loc:
        if is_dataclass(cls):
            cls = get_type_hints(cls).get(str(part), cls)
        cls = _element(cls)
    return [f.name for f in fields(cls)] if is_dataclass(cls) else []


def _element(hint: Any) -> Any:
    """The dataclass within ``X | None``, ``tuple[X, ...]`` or ``dict[str, X]``."""
    if is_dataclass(hint):
        return hint
    inner = [_element(arg) for arg in get_args(hint)]
    return next((arg for arg in inner if is_dataclass(arg)), hint)
