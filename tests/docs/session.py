"""A page of the documentation as a person follows it: its files saved, its commands typed into one shell, in order."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from smes_cli.demo.processes import spawn
from tests.docs.pages import blocks
from tests.running import environment

_MARK = "@@ block"


@dataclass(frozen=True, slots=True)
class Ran:
    """One block of commands.

    Attributes:
        commands: As the page has them.
        printed: What they printed.
        shown: What the page says that they print; empty if it says nothing.
    """

    commands: str
    printed: str
    shown: str


def follow(page: str, folder: Path, changes: Mapping[str, str], within_s: float) -> list[Ran]:
    """Do what a page says, in an empty folder.

    Args:
        page: Path of the page in the repository.
        folder: Where.
        changes: Text of the page → what stands for it here, such as another port.
        within_s: Longest time for all of it, seconds.

    Raises:
        AssertionError: A command failed, or it took too long.
    """
    found = blocks(page)
    for block in found:
        if block.title is not None:
            (folder / block.title).write_text(_changed(block.text, changes))
    shells = [(block, after) for block, after in zip(found, [*found[1:], None], strict=True) if block.language == "sh"]
    steps = [f"echo '{_MARK}'\n{_changed(block.text, changes)}" for block, _ in shells]
    script = folder / "page.sh"
    # Job control, as in the shell of a person: `kill %2`. What is left running ends with the shell.
    script.write_text("\n".join(["set -em", "trap 'kill $(jobs -p) 2> jobs.log || true' EXIT", *steps]))
    log = folder / "page.log"
    env = environment(PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    shell = spawn(["bash", str(script)], log=log, env=env, cwd=folder)
    try:
        status = shell.wait(within_s)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        shell.terminate()
        shell.wait(30)
    printed = log.read_text()
    assert status == 0, f"{page}: status {status} after {within_s:g} s at most\n{printed}\n{_logs(folder)}"
    outputs = printed.split(f"{_MARK}\n")[1:]
    return [
        Ran(block.text, output, _changed(after.text, changes) if after is not None and not after.language else "")
        for (block, after), output in zip(shells, outputs, strict=True)
    ]


def skeleton(text: str) -> list[str]:
    """Lines without numbers, random names and further blanks, and without what comes after an ellipsis."""
    lines = [re.sub(r"\b[0-9a-f]{8,}\b|\d[\d.,]*|–", "0", " ".join(line.split())) for line in text.splitlines()]
    return [line.partition("…")[0].rstrip() for line in lines if line.partition("…")[0].strip()]


def assert_prints(ran: Ran) -> None:
    """Check that every line that the page shows was printed, numbers aside."""
    printed = skeleton(ran.printed)
    for line in skeleton(ran.shown):
        assert any(each.startswith(line) for each in printed), f"{line!r} is not in\n{ran.printed}"


def _changed(text: str, changes: Mapping[str, str]) -> str:
    for before, after in changes.items():
        assert after not in text or before in text, f"{after!r} stands on the page already"
        text = text.replace(before, after)
    return text


def _logs(folder: Path) -> str:
    return "\n".join(f"== {path.name}\n{path.read_text()[-2000:]}" for path in sorted(folder.glob("*.log")))
