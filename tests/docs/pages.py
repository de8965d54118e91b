"""What a page of the documentation shows, in order: files, commands and code to run, and what they print."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_TITLE = re.compile(r'title="([^"]+)"')


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block.

    Attributes:
        language: ``python``, ``sh``, ``yaml``, …; empty for what a command or code before it prints.
        title: The name of the file that it is, if the page gives one.
        text: Its lines.
        line: Its first line on the page, counted from 1.
    """

    language: str
    title: str | None
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, a path in the repository."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [_block(found, text) for found in _FENCE.finditer(text)]


def _block(found: re.Match[str], text: str) -> Block:
    indent, info, body = found.groups()
    title = _TITLE.search(info)
    lines = "".join(line.removeprefix(indent) for line in body.splitlines(keepends=True))
    return Block(info.split(" ")[0], title and title[1], lines, text.count("\n", 0, found.start()) + 2)
