"""What a library user copies first runs as it stands: the package's doctest and README's Python blocks."""

import doctest
import re
from pathlib import Path

import pytest

import smes

_README = Path(__file__).parents[2] / "README.md"


def test_the_packages_docstring_runs() -> None:
    result = doctest.testmod(smes)
    assert (result.failed, result.attempted > 5) == (0, True)


def test_readmes_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", _README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 1
    exec(compile(blocks[0], str(_README), "exec"), {})
    said = re.fullmatch(r"loss ([\d.]+); ([\d.]+) of 64 experts run for an instance\n", capsys.readouterr().out)
    assert said is not None
    assert 0 < float(said[1]) < 5
    assert 1 <= float(said[2]) <= 64
