"""The public surface of the library, and that its example runs: the package's doctest."""

import doctest
import subprocess
import sys
from pathlib import Path

import pytest

import smes

_ROOT = Path(__file__).parents[2]


def test_dir_shows_the_public_names_only() -> None:
    assert dir(smes) == sorted(smes.__all__)


@pytest.mark.parametrize("name", smes.__all__)
def test_a_public_name_can_be_loaded(name: str) -> None:
    assert getattr(smes, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'smes' has no attribute 'Lerner'"):
        smes.Lerner  # noqa: B018  # the access is the point


@pytest.mark.parametrize("module", ["smes", "smes.schema", "smes.events", "smes.metrics", "smes.model.config"])
def test_the_vocabulary_is_imported_without_torch(module: str) -> None:
    program = f"import sys, {module}; dir(sys.modules['smes']); assert 'torch' not in sys.modules"

    subprocess.run([sys.executable, "-P", "-c", program], check=True, cwd=_ROOT)


def test_the_packages_docstring_runs() -> None:
    result = doctest.testmod(smes)
    assert (result.failed, result.attempted > 5) == (0, True)
