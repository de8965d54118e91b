"""Schema files, read without the libraries that check a whole deployment's configuration.

What counts is the same as for :mod:`smes_io.schema_file`: both give equal schemas of the same file.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec

from smes.derived import spelled_out
from smes.schema import Derived, Feature, History, Schema, Task

_LISTS: dict[str, type[Any]] = {"tasks": Task, "features": Feature, "derive": Derived}
_KEYS = {"name", "history", *_LISTS}
_NOT_OURS = {"log", "renamed"}  # how a log lies in files, and what a schema was before


def load_schema(source: str | Path | Mapping[str, Any] | Schema) -> Schema:
    """The schema of a file, or of what stands in one.

    Args:
        source: Path of a schema file; or its content as a mapping; or a schema, which is returned.

    Raises:
        ValueError: It cannot be read, or an entry is missing, unknown or out of range.
    """
    if isinstance(source, Schema):
        return source
    if isinstance(source, Mapping):
        return _schema(source, "schema")
    return _schema(_mapping(Path(source)), str(source))


def _mapping(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: expected a readable schema file ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected YAML ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a mapping of keys to values, got {type(data).__name__}")
    return data


def _schema(data: Mapping[str, Any], where: str) -> Schema:
    if unknown := data.keys() - _KEYS - _NOT_OURS:
        expected = ", ".join(sorted(_KEYS | _NOT_OURS))
        raise ValueError(f"{where}: {min(map(str, unknown))}: an unknown key, expected one of {expected}")
    try:
        lists = {key: _entries(data.get(key) or (), kind, key) for key, kind in _LISTS.items()}
        history = data.get("history")
        return Schema(
            name=msgspec.convert(data.get("name"), str),
            tasks=lists["tasks"],
            features=lists["features"],
            history=None if history is None else _entry(history, History, "history"),
            derived=lists["derive"],
        )
    except ValueError as error:  # msgspec's, too
        raise ValueError(f"{where}: {error}") from None


def _entries(values: Any, kind: type[Any], key: str) -> tuple[Any, ...]:
    if not isinstance(values, list | tuple):
        raise ValueError(f"{key}: expected a list")
    return tuple(_entry(value, kind, f"{key}.{i}") for i, value in enumerate(values))


def _entry(value: Any, kind: type[Any], key: str) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{key}: expected a mapping")
    names = [f.name for f in fields(kind)]
    if unknown := value.keys() - set(names):
        raise ValueError(f"{key}.{min(map(str, unknown))}: an unknown key, expected one of {', '.join(names)}")
    try:
        return msgspec.convert(spelled_out(value) if kind is Derived else value, kind)
    except msgspec.ValidationError as error:
        raise ValueError(f"{key}: {error}") from error
