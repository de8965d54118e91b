"""Ranges of configuration values, written as annotations.

The same annotations are read three times: by pydantic where a file is read, by :func:`check_ranges` where a
configuration is made in Python, and by the generator of ``docs/reference/configuration.md``.

>>> from dataclasses import dataclass
>>> @dataclass(frozen=True)
... class Config:
...     size: Annotated[int, Ge(1)] = 256
...     def __post_init__(self) -> None:
...         check_ranges(self)
>>> Config(size=0)
Traceback (most recent call last):
ValueError: Config.size: 0, expected at least 1
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from functools import lru_cache
from math import isinf
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen, MultipleOf

Width = Annotated[int, Ge(8), MultipleOf(8)]
"""Width of a layer that a grouped GEMM reads or writes: the GPU wants rows of 16 bytes."""
PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Seconds = Annotated[float, Gt(0), Le(1_000_000)]
"""Of wall-clock time, eleven days at most: sockets and locks can wait for so long."""
SecondsOrZero = Annotated[float, Ge(0), Le(1_000_000)]
EventSeconds = Annotated[float, Gt(0), Le(1_000_000_000)]
"""Of event time, 30 years at most: in milliseconds they can be added to any time."""
EventSecondsOrZero = Annotated[float, Ge(0), Le(1_000_000_000)]
Share = Annotated[float, Ge(0), Le(1)]


def check_ranges(config: object, where: str | None = None) -> None:
    """Check every field of a dataclass instance against its annotation: ranges, lengths and literals.

    Call it in ``__post_init__``. Nested dataclasses check themselves.

    Args:
        config: The instance.
        where: What the message calls the instance. The default is the name of its class.

    Raises:
        ValueError: ``where.field: value, expected …``.
    """
    for name, hint in _hints(type(config)).items():  # type: ignore[arg-type]  # a class is hashable
        value = getattr(config, name)
        wanted = expected(hint)
        if wanted and not _fits(value, hint):
            quoted = list(value) if isinstance(value, tuple) else value
            if isinstance(value, float) and isinf(value):
                wanted = f"a finite number, {wanted}"
            raise ValueError(f"{where or type(config).__name__}.{name}: {quoted!r}, expected {wanted}")


def expected(hint: Any) -> str:
    """What an annotation allows, in words; empty where it allows everything of its type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        inner = expected(arguments[0])
        return ", ".join(part for part in (inner, *_words(arguments[1:])) if part)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else str(arguments[0])
    if origin in (Union, UnionType):
        parts = [expected(part) for part in arguments if part is not NoneType]
        words = " or ".join(part for part in parts if part)
        return f"{words}, or null" if words and NoneType in arguments else words
    if origin in (tuple, list, dict):
        elements = [part for part in (arguments[-1:] if origin is dict else arguments) if part is not Ellipsis]
        words = next((expected(part) for part in elements if expected(part)), "")
        return f"each {words}" if words else ""
    return ""


@lru_cache(maxsize=256)
def _hints(cls: type) -> Mapping[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in fields(cls)}


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fits(value, arguments[0]) and all(_within(value, bound) for bound in _bounds(arguments[1:]))
    if origin is Literal:
        return value in arguments
    if origin in (Union, UnionType):
        return value is None or any(_fits(value, part) for part in arguments if part is not NoneType)
    if origin is dict:
        return all(_fits(element, arguments[1]) for element in value.values())
    if origin in (tuple, list):
        element_hints = [arguments[0]] * len(value) if Ellipsis in arguments or origin is list else arguments
        return len(element_hints) == len(value) and all(map(_fits, value, element_hints))
    return True


def _bounds(metadata: Iterable[Any]) -> Iterator[Any]:
    return (bound for bound in metadata if isinstance(bound, Ge | Gt | Le | Lt | MultipleOf | MinLen | MaxLen))


def _within(value: Any, bound: Any) -> bool:
    if isinstance(value, str) and isinstance(bound, Ge | Gt | Le | Lt | MultipleOf):
        return False  # such as a word where a union also allows a number
    if isinstance(value, float) and isinf(value):
        return False  # nothing can be computed with it
    match bound:
        case Ge(least):
            return bool(value >= least)
        case Gt(least):
            return bool(value > least)
        case Le(most):
            return bool(value <= most)
        case Lt(most):
            return bool(value < most)
        case MultipleOf(unit):
            return bool(value % unit == 0)
        case MinLen(least):
            return len(value) >= least
        case MaxLen(most):
            return len(value) <= most
    raise TypeError(f"bound {bound!r}: expected one of _bounds")


def _words(metadata: Iterable[Any]) -> Iterator[str]:
    for bound in _bounds(metadata):
        match bound:
            case Ge(least):
                yield f"at least {least}"
            case Gt(least):
                yield f"more than {least}"
            case Le(most):
                yield f"at most {most}"
            case Lt(most):
                yield f"less than {most}"
            case MultipleOf(unit):
                yield f"a multiple of {unit}"
            case MinLen(least):
                yield f"{least} or more entries"
            case MaxLen(most):
                yield f"{most} or fewer entries"
