"""Names for the columns of files that have no header: from a description that lies beside them, or from their content.

Published data sets often say in a README which columns a file has: ``user id | item id | rating | timestamp``.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from simulators.logs.infer_format import unique_names

_READ_BYTES = 300_000
_LISTS = re.compile(r"::|\||\t")
_DESCRIPTIONS = re.compile(r"readme|describ|descri|column|schema|format|\.md$|\.txt$|\.html$", re.I)


@dataclass(frozen=True)
class Names:
    """Names that a text beside the files gives.

    Attributes:
        names: As they are written there.
        file: The text.
    """

    names: tuple[str, ...]
    file: str


def described_names(folder: Path, others: Sequence[str], files: Sequence[Path], count: int) -> Names | None:
    """The names of a table's columns from a text beside it.

    Args:
        folder: Where to look.
        others: Names of the files there.
        files: The table's files.
        count: Number of its columns.
    """
    found: list[tuple[bool, Names]] = []
    for name in others:
        path = folder / name
        if not _DESCRIPTIONS.search(name) or path in files or path.stat().st_size > _READ_BYTES:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        for names, before in _lists(text, count):
            mentioned = any(file.name in before or file.stem in before for file in files)
            found.append((mentioned, Names(names, name)))
    named = [names for mentioned, names in found if mentioned] or [names for _, names in found]
    return named[-1] if len({names.names for names in named}) == 1 else None


def flag_names(folder: Path, others: Sequence[str], names: Sequence[str]) -> tuple[str, list[str]] | None:
    """A file that lists what some columns of 0 and 1 mean, one name a line: its kind and the names; None without one.

    The published MovieLens has ``u.genre``: ``unknown|0``, ``Action|1``, …

    Args:
        names: The names of the columns; a list in a file fits if it has as many.
    """
    for name in others:
        path = folder / name
        if path.stat().st_size > _READ_BYTES:
            continue
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        rows = [re.split(r"[|\t,;]", line.strip()) for line in lines if line.strip()]
        if len(rows) == len(names) and all(re.search(r"[A-Za-z]", row[0]) and len(row[0]) < 40 for row in rows):
            stem = path.suffix.lstrip(".") or path.stem
            return slug(stem if stem not in ("txt", "csv", "dat") else path.stem), [row[0].strip() for row in rows]
    return None


def slug(name: str) -> str:
    """A name as a column has it: lower case, digits and ``_``."""
    return re.sub(r"\W+", "_", name.strip(), flags=re.ASCII).strip("_").lower() or "column"


def slugs(names: Sequence[str]) -> tuple[str, ...]:
    """Different names for columns."""
    return unique_names([slug(name) for name in names])


def _lists(text: str, count: int) -> Iterator[tuple[tuple[str, ...], str]]:
    """Lists of so many names between ``|``, ``::`` or tabs, over one line or several, and the text before each."""
    lines = text.splitlines()
    block: list[str] = []
    for i, line in enumerate([*lines, ""]):
        if _LISTS.search(line.strip()):
            block.append(line.strip())
            continue
        if block:
            names = [part.strip(" .;`'\"") for part in _LISTS.split(" ".join(block).replace("| |", "|"))]
            names = [name for name in names if name]
            if len(names) == count and all(len(name) <= 40 for name in names):
                yield tuple(names), "\n".join(lines[max(i - len(block) - 4, 0) : i])
            block = []
