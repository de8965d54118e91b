"""Write the lists of keys in ``docs/reference/configuration.md`` from the configuration's dataclasses (``make docs``).

A list stands between ``<!-- keys: SECTION -->`` and ``<!-- end of keys -->``, where SECTION is a key of the file's top
level. Each entry holds the key, its default, its range from the annotation, and its meaning from the ``Attributes`` of
the class docstring. Everything outside the markers is written by hand and stays as it is.
"""

import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from smes.ranges import expected
from smes_cli.config import Config
from smes_cli.generated_lists import filled, wrapped

_IN_YAML = {r"(^|\. )None\b": r"\1Null", r"\bNone\b": "null"}
_ROLE = re.compile(r":\w+:`~?(?:[\w.]+\.)?(\w+)`")


@dataclass(frozen=True)
class Key:
    """A key of the configuration file.

    Attributes:
        path: Its place in the file, with dots between levels.
        default: Its default value.
        range: What it may be, in words; empty if every value of its type is allowed.
        meaning: Its description, as Markdown.
    """

    path: str
    default: Any
    range: str
    meaning: str


def keys(config: Any, prefix: str = "") -> Iterator[Key]:
    """All keys below a configuration dataclass, in the order of its fields.

    Raises:
        ValueError: A field is not described in its class docstring.
    """
    hints, meanings = get_type_hints(type(config), include_extras=True), attributes(type(config))
    for field in fields(config):
        path, value = f"{prefix}{field.name}", getattr(config, field.name)
        if is_dataclass(value):
            yield from keys(value, f"{path}.")
        elif field.name not in meanings:
            raise ValueError(f"{type(config).__name__}.{field.name}: expected its meaning in the class docstring")
        else:
            yield Key(path, value, expected(hints[field.name]), meanings[field.name])


def attributes(cls: type) -> dict[str, str]:
    """The ``Attributes`` section of a class docstring: field → meaning, as Markdown in one line."""
    _, _, section = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    body = textwrap.dedent(re.split(r"\n(?=\S)", section, maxsplit=1)[0])
    meanings: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", body):
        names, _, text = entry.partition(": ")
        markdown = _ROLE.sub(r"`\1`", " ".join(text.split())).replace("``", "`")
        for in_python, in_yaml in _IN_YAML.items():
            markdown = re.sub(in_python, in_yaml, markdown)
        meanings |= dict.fromkeys(names.split(", "), markdown)
    return meanings


def entry(key: Key) -> str:
    """One entry of a list of keys, wrapped."""
    value = list(key.default) if isinstance(key.default, tuple) else key.default
    default = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
    head = f"- `{key.path}`: `{default}`" + (f" ({key.range})" if key.range else "")
    return wrapped(f"{head}. {key.meaning}")


def generated(page: str) -> str:
    """The page with every list between markers written anew.

    Raises:
        ValueError: The page lacks a section of the configuration, or names one that does not exist.
    """
    lists: dict[str, list[str]] = {}
    for key in keys(Config()):
        lists.setdefault(key.path.partition(".")[0], []).append(entry(key))
    return filled(page, "keys", {section: "\n".join(entries) for section, entries in lists.items()})


def main(path: Path) -> None:
    """Rewrite the page."""
    path.write_text(generated(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
