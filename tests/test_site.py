"""The site of the documentation: links to files of the repository lead to pages, and what leads nowhere is an error.

`make check` builds the real one; here it is a small repository with the same hook.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mkdocs_hook import in_markdown, misread

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
site_name: small
site_dir: build/site
docs_dir: docs
strict: true
use_directory_urls: false
theme: {name: mkdocs, highlightjs: false, include_search_page: false}
plugins: []
hooks: [mkdocs_hook.py]
markdown_extensions: [pymdownx.superfences]
validation: {links: {anchors: warn}}
nav: [index.md, Changes: files/CHANGELOG.md, Decisions: []]
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    files = {
        "mkdocs.yml": CONFIG,
        "CHANGELOG.md": "# Changes\n\nSee [the page](docs/index.md#here), [one more](notes/more.md).",
        "CONTRIBUTING.md": "# How\n",
        "notes/more.md": "# More\n\n[Code](../code/run.py)",
        "code/run.py": 'print("```")  # <here>\n',
        "docs/index.md": "# Small\n\n## Here\n\n[Changes](../CHANGELOG.md), [decided][one], [all](adr), "
        "[out](https://a.test/)\n\n[one]: adr/0001-one.md\n\n```md\n[not](a/link.md)\n```\n",
        "docs/adr/README.md": "# Decisions\n",
        "docs/adr/0001-one.md": "# 1. One\n\nAs [in code](../../code/run.py).\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    shutil.copy(ROOT / "mkdocs_hook.py", tmp_path)
    return tmp_path


def build(repository: Path) -> tuple[int, str]:
    command = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


def test_files_of_the_repository_become_pages(repository: Path) -> None:
    code, said = build(repository)

    assert code == 0, said
    site = repository / "build/site"
    index = (site / "index.html").read_text()
    for link in ('"files/CHANGELOG.html"', '"adr/0001-one.html"', '"adr/index.html"', '"https://a.test/"'):
        assert f"href={link}" in index
    assert "a/link.md" in re.sub("<[^>]+>", "", index)  # in a listing it stays text
    assert 'href="../files/code/run.py.html"' in (site / "adr/0001-one.html").read_text()
    assert "&lt;here&gt;" in (site / "files/code/run.py.html").read_text()
    assert 'href="../index.html#here"' in (site / "files/CHANGELOG.html").read_text()
    assert 'href="../code/run.py.html"' in (site / "files/notes/more.html").read_text()
    assert (repository / "build/external-links.txt").read_text() == "https://a.test/\n"


def test_what_leads_nowhere_is_an_error(repository: Path) -> None:
    with (repository / "docs/index.md").open("a") as page:
        page.write(
            "\n[a](../code/gone.py) [b](gone.md) [c](adr/0001-one.md#gone) [d](#gone)\n\n<a href='gone.html'>e</a>\n"
            "<img src='https://b.test/pixel.png'>\n\n- entry\n\n  its second paragraph\n"
        )

    code, said = build(repository)

    assert code == 1
    for expected in (
        "docs/index.md: ../code/gone.py leads to no file",
        "docs/index.md: gone.md leads to no file",
        "'adr/0001-one.md#gone'",
        "'#gone'",
        "index.html: gone.html leads to no file",
        "index.html: #gone leads to no place of the page",
        "https://b.test/pixel.png is loaded from another host",
        "docs/index.md: line 20: expected four spaces before its second paragraph",
    ):
        assert expected in said, said


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("- a\n\n  b\n", [3]),
        ("1. a\n   ```sh\n   b\n   ```\n", [2]),
        ("- a\n  - b\n", [2]),
        ("- a\n\n    b\n\n    ```sh\n  - c\n\n  d\n    ```\n", []),
        ("- a\n  goes on\n- b\n\n```\n - b\n```\n", []),
        ("a\n- b\n", [2]),
        ("a\n| b |\n|---|\n", [2]),
        ("# a\n- b\n1. c\n2. d\n", []),
    ],
)
def test_what_python_markdown_reads_otherwise_is_found(text: str, lines: list[int]) -> None:
    assert [int(problem.split()[1].rstrip(":")) for problem in misread(text)] == lines


def test_docstrings_become_markdown() -> None:
    docstring = (
        "As :meth:`smes.schema.Schema.of`.\n\n>>> a = 1  # doctest: +SKIP\n>>> a\n1\n\nThen :class:`~x.Y`.\n\n"
        "Args:\n    a, b: Their ids,\n        of both.\n    c: No, not: this.\n"
    )

    assert in_markdown(docstring) == (
        "As `of`.\n\n```pycon\n>>> a = 1\n>>> a\n1\n```\n\nThen `Y`.\n\n"
        "Args:\n    a: Their ids,\n        of both.\n    b: Their ids,\n        of both.\n    c: No, not: this.\n"
    )
