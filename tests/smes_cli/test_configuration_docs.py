"""``docs/reference/configuration.md`` lists every key of the program, with its default, its range and its meaning."""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from smes.ranges import PositiveInt
from smes_cli.config import Config
from smes_cli.configuration_docs import Key, attributes, entry, generated, keys
from smes_cli.generated_lists import COLUMNS

PAGE = (Path(__file__).resolve().parents[2] / "docs/reference/configuration.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Inner:
    """Part of a configuration.

    Attributes:
        size: How many, see :class:`smes.schema.Schema`. None: ``many``,
            or more.
        dims: Widths.
    """

    size: PositiveInt | None = None
    dims: tuple[int, ...] = (8, 4)


@dataclass(frozen=True)
class Outer:
    """A configuration.

    Attributes:
        kind, other: Both of them.
        inner: Not a key.

    Raises:
        ValueError: Never.
    """

    kind: Literal["a", "b"] = "a"
    other: bool = True
    inner: Inner = field(default_factory=Inner)


@dataclass(frozen=True)
class Undocumented:
    """A configuration whose key has no meaning."""

    key: int = 0


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for f in dataclasses.fields(value):
        below = getattr(value, f.name)
        if dataclasses.is_dataclass(below):
            yield from leaves(below, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, list(below) if isinstance(below, tuple) else below


def test_the_page_is_up_to_date() -> None:
    assert generated(PAGE) == PAGE, "run make docs"


def test_the_page_has_every_key_with_its_default() -> None:
    entries = re.findall(r"^- `([a-z_.]+)`: `([^`]*)`", PAGE, re.MULTILINE)

    documented = {key: yaml.safe_load(default) for key, default in entries}

    assert len(documented) == len(entries)
    assert documented == dict(leaves(Config()))


def test_keys_have_path_default_range_and_meaning() -> None:
    assert list(keys(Outer())) == [
        Key("kind", "a", "one of a, b", "Both of them."),
        Key("other", True, "", "Both of them."),
        Key("inner.size", None, "at least 1, or null", "How many, see `Schema`. Null: `many`, or more."),
        Key("inner.dims", (8, 4), "", "Widths."),
    ]


def test_a_key_without_a_meaning_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Undocumented\.key: expected its meaning in the class docstring"):
        list(keys(Undocumented()))


def test_only_the_section_of_attributes_is_read() -> None:
    assert attributes(Outer).keys() == {"kind", "other", "inner"}


def test_an_entry_is_wrapped() -> None:
    lines = entry(Key("a.b", (1, 2), "each at least 1", "word " * 60)).splitlines()

    assert lines[0].startswith("- `a.b`: `[1, 2]` (each at least 1). word")
    assert len(lines) > 2
    assert all(len(line) <= COLUMNS for line in lines)


def test_what_is_written_by_hand_stays() -> None:
    page = "# Title\n\n" + PAGE.replace("<!-- keys: scorer -->\n", "<!-- keys: scorer -->\nold list\n")

    assert generated(page) == "# Title\n\n" + PAGE


def test_a_page_without_a_section_is_refused() -> None:
    with pytest.raises(ValueError, match=r"<!-- keys: NAME -->' once; the page lacks 'scorer'"):
        generated(PAGE.replace("<!-- keys: scorer -->", ""))
