"""Nothing that a test of the whole starts stays behind, and its settings stay its own."""

import logging
from collections.abc import Iterator

import pytest

from smes_cli.console import console
from tests.e2e.shop import Shop, write_shop
from tests.integration.training import one_thread
from tests.running import stop_started


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers, quiet = root.level, root.handlers[:], console.quiet
    with one_thread():
        yield
    stop_started()
    root.setLevel(level)
    root.handlers[:] = handlers
    console.quiet = quiet


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """A log in another schema than the built-in ones."""
    return write_shop(tmp_path_factory.mktemp("shop"))
