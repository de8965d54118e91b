"""The code on the pages of concepts prints what the pages say that it prints."""

import contextlib
import io
from typing import Any

import pytest

from tests.docs.pages import blocks


def run_page(page: str) -> list[tuple[int, str, str]]:
    """Run a page's Python in one namespace; of each block its line, what the page says it prints, and what it did."""
    found, names, outcomes = blocks(page), dict[str, Any](), []
    for block, following in zip(found, [*found[1:], None], strict=True):
        if block.language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(block.text, f"{page}:{block.line}", "exec"), names)
            shown = following.text if following is not None and not following.language else ""
            outcomes.append((block.line, shown, out.getvalue()))
    return outcomes


@pytest.mark.parametrize(("page", "outputs"), [("one-event.md", 4), ("join.md", 3), ("progressive-evaluation.md", 3)])
def test_code_prints_what_the_page_shows(page: str, outputs: int) -> None:
    outcomes = run_page(f"docs/concepts/{page}")

    assert sum(bool(printed) for _, _, printed in outcomes) == outputs
    for line, shown, printed in outcomes:
        assert printed == shown, f"{page}:{line}"
