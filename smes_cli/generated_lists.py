"""Parts of a page that are written by a program stand between two comments; all else is written by hand and stays.

A part begins with ``<!-- KIND: NAME -->`` and ends with ``<!-- end of KIND -->``.
"""

import re
import textwrap
from collections.abc import Mapping

COLUMNS = 120


def wrapped(entry: str) -> str:
    """An entry of a list, broken into lines of at most 120 columns."""
    return textwrap.fill(entry, COLUMNS, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def filled(page: str, kind: str, parts: Mapping[str, str]) -> str:
    """The page with every part of a kind written anew.

    Args:
        page: Markdown.
        kind: Of the comments.
        parts: Name → Markdown.

    Raises:
        ValueError: The page lacks a part, has one twice, or has one that is not among the given.
    """
    part = re.compile(rf"<!-- {kind}: ([^\n]+) -->\n.*?<!-- end of {kind} -->", re.DOTALL)
    found = part.findall(page)
    if sorted(found) != sorted(parts):
        wrong = [f"lacks {name!r}" for name in sorted(parts.keys() - set(found))]
        wrong += [f"has {name!r}, which there is not" for name in sorted(set(found) - parts.keys())]
        wrong += [f"has {name!r} {found.count(name)} times" for name in sorted(parts) if found.count(name) > 1]
        raise ValueError(f"expected each part '<!-- {kind}: NAME -->' once; the page {', '.join(wrong)}")
    return part.sub(lambda at: f"<!-- {kind}: {at[1]} -->\n\n{parts[at[1]]}\n\n<!-- end of {kind} -->", page)
