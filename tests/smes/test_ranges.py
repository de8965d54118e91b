"""Ranges as annotations: what they refuse, and in which words."""

import doctest
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen, MultipleOf

from smes import ranges
from smes.ranges import check_ranges, expected


@dataclass(frozen=True)
class Config:
    size: Annotated[int, Ge(8), MultipleOf(8)] = 8
    rate: Annotated[float, Gt(0), Lt(1)] = 0.5
    share: Annotated[float, Ge(0), Le(1)] = 1.0
    boost: Annotated[float, Gt(0)] = 1.0
    form: Literal["wide", "narrow"] = "wide"
    limit: Annotated[int, Ge(1)] | None = None
    until: Literal["end"] | Annotated[int, Ge(0)] = "end"
    dims: tuple[Annotated[int, Ge(1)], ...] = ()
    names: Annotated[tuple[str, ...], MinLen(1), MaxLen(2)] = ("a",)
    weights: Mapping[str, float] = field(default_factory=dict)
    anything: Any = None

    def __post_init__(self) -> None:
        check_ranges(self)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 0}, "Config.size: 0, expected at least 8, a multiple of 8"),
        ({"size": 12}, "Config.size: 12, expected at least 8, a multiple of 8"),
        ({"rate": 0.0}, "Config.rate: 0.0, expected more than 0, less than 1"),
        ({"rate": 1.0}, "Config.rate: 1.0, expected more than 0, less than 1"),
        ({"share": 1.5}, "Config.share: 1.5, expected at least 0, at most 1"),
        ({"share": float("nan")}, "Config.share: nan, expected at least 0, at most 1"),
        ({"boost": float("inf")}, "Config.boost: inf, expected a finite number, more than 0"),
        ({"form": "flat"}, "Config.form: 'flat', expected one of wide, narrow"),
        ({"limit": 0}, "Config.limit: 0, expected at least 1, or null"),
        ({"until": -1}, "Config.until: -1, expected end or at least 0"),
        ({"until": "start"}, "Config.until: 'start', expected end or at least 0"),
        ({"dims": (4, 0)}, "Config.dims: [4, 0], expected each at least 1"),
        ({"names": ()}, "Config.names: [], expected 1 or more entries, 2 or fewer entries"),
        ({"names": ("a", "b", "c")}, "Config.names: ['a', 'b', 'c'], expected 1 or more entries, 2 or fewer entries"),
    ],
)
def test_a_value_out_of_range_is_refused_with_key_value_and_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Config(**values)

    assert str(error.value) == message


@pytest.mark.parametrize(
    "values", [{}, {"limit": 1}, {"limit": None}, {"until": 3}, {"dims": (1, 2)}, {"weights": {"a": -1.0}}]
)
def test_values_in_range_are_accepted(values: dict[str, Any]) -> None:
    Config(**values)


def test_a_message_can_name_the_instance_instead_of_its_class() -> None:
    config = Config()
    object.__setattr__(config, "size", 0)

    with pytest.raises(ValueError, match=r"feature 'tags'\.size: 0, expected at least 8"):
        check_ranges(config, where="feature 'tags'")


def test_an_annotation_without_range_has_no_words() -> None:
    assert expected(int) == expected(str | None) == expected(tuple[int, ...]) == ""


def test_the_docstrings_example_runs() -> None:
    assert doctest.testmod(ranges).failed == 0
