"""What surrounds the code says what the code does: README, documentation, lock file."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.core import TyperGroup

from smes_cli.__main__ import run
from smes_cli.app import app
from smes_cli.command_docs import commands

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def section(text: str, heading: str) -> str:
    """The lines under a heading, down to the next one of its rank or above."""
    rank = len(heading) - len(heading.lstrip("#"))
    _, found, rest = f"\n{text}".partition(f"\n{heading}\n")
    assert found, f"no heading {heading!r}"
    return re.split(rf"^#{{1,{rank}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


# ---- README and documentation


def test_readme_is_short_and_its_map_is_true() -> None:
    readme = (ROOT / "README.md").read_text()

    [tree_map] = fenced(section(readme, "## Map"), "")
    paths = [line.split()[0] for line in tree_map.splitlines()]

    assert len(readme.splitlines()) <= 150
    assert len(paths) > 5
    assert [path for path in paths if not (ROOT / path).exists()] == []


def tracked(*patterns: str) -> list[Path]:
    """Files of the repository that match one of the patterns."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the tree is not known")
    command = ["git", "ls-files", "-z", "--", *patterns]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).exists()]


def test_no_line_is_longer_than_120_columns() -> None:
    files = tracked("*.md", "*.yml", "*.yaml", "*.toml", "*.py", "Makefile", "Dockerfile", ".ci/*")

    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 120
    ]

    assert len(files) > 100
    assert long == []


@pytest.mark.parametrize("path", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_named_in_the_documentation_exist(path: Path) -> None:
    if path.name == "CHANGELOG.md":
        return  # tells of files that were
    folders = {p.name for p in ROOT.iterdir() if p.is_dir()}

    named = re.findall(r"`([a-z_./]+/[a-z_./]+\.(?:py|yaml|yml|md))`", path.read_text())

    assert [name for name in named if name.split("/")[0] in folders and not (ROOT / name).exists()] == []


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"(?:\]\(|^\[[^\]]+\]: )([^)\s]+)", path.read_text(), re.MULTILINE):
        if not target.startswith(("http://", "https://")):
            name, _, anchor = target.partition("#")
            page = path.parent / name if name else path
            assert page.exists(), f"{path.name}: {target}"
            assert not anchor or anchor in anchors(page), f"{path.name}: {target}"


@pytest.mark.parametrize("path", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_make_targets_in_the_documentation_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"install", "demo", "test", "check", "bench"} <= targets
    assert set(re.findall(r"`make ([a-z]+)`", path.read_text())) <= targets


def test_changelog_has_the_version_and_the_lock_fits_the_requirements() -> None:
    project = PYPROJECT["project"]
    assert re.search(rf"^## \[?{re.escape(project['version'])}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    pins = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines())
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    assert len(pinned) == len(pins)
    bench = dict(line.split("==") for line in (ROOT / "requirements-bench.lock").read_text().splitlines())
    assert not bench.keys() & pins.keys(), "pinned twice"
    pinned |= {canonicalize_name(name): version for name, version in bench.items()}
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["dev"], *extras["bench"]]:
        needed = Requirement(text)
        assert needed.specifier.contains(pinned[canonicalize_name(needed.name)]), text


# ---- every command line shown


def root_command() -> TyperGroup:
    command = typer.main.get_command(app)
    assert isinstance(command, TyperGroup)
    return command


def parse(arguments: list[str]) -> str:
    """Parse a command line with the real command, without running it; the command's path.

    Raises:
        Exception: What the command raises for a wrong command line.
    """
    root = root_command()
    ran: list[str] = []
    root.callback = None

    def record(path: str) -> Any:
        return lambda **parameters: ran.append(path)

    for path, command in commands(root):
        command.callback = record(path)
    root.main(arguments, prog_name="smes", standalone_mode=False)
    assert len(ran) == 1, f"smes {shlex.join(arguments)}: expected one command, parsed {ran}"
    return ran[0]


def test_a_wrong_command_line_does_not_parse() -> None:
    assert parse(["-q", "features", "load", "x"]) == "smes features load"
    for wrong in ("train --speed 1", "snapshots show later", "demo --codec xml", "scale"):
        with pytest.raises(Exception, match=r"No such|Input should be|is not one of"):
            parse(wrong.split())


def shell_lines(script: str) -> Iterator[list[str]]:
    """The ``smes`` calls in a shell script, as argument lists."""
    for line in script.replace("\\\n", " ").splitlines():
        if found := re.search(r"(?:^|\|\| |exec |\.venv/bin/)smes (.*)", line.strip()):
            words = shlex.split(found[1], comments=True)
            yield list(takewhile(lambda word: word not in {"&", "|"} and not re.match("[0-9&]?>", word), words))


@pytest.mark.parametrize("path", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_command_lines_in_the_documentation_parse(path: Path) -> None:
    for block in fenced(path.read_text(), "sh"):
        for arguments in shell_lines(block):
            parse(arguments)


def test_the_page_on_your_own_log_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs/your-own-log.md").read_text()
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "-P", "-c", fenced(text, "python")[0]], check=True)
    schema, *others = fenced(text, "yaml")
    derive = next(block for block in others if block.startswith("derive:"))
    Path("shop.yaml").write_text(schema + derive)
    assert run(["backtest", "shop.parquet", "--schema", "shop.yaml", "--limit", "2000", "--report", "report.json"]) == 0
    report = json.loads(Path("report.json").read_text())
    assert report["events"]["trained"] == 2000
    assert list(report["tasks"]) == ["open", "buy", "stars"]
