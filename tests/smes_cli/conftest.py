"""What the command sets for its process is pytest's here, and is as it was after each test."""

import os
from collections.abc import Iterator

import pytest

from tests.integration.training import one_thread
from tests.running import stop_started


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore the number of threads, and stop the processes that a failed test has left running."""
    for name in [name for name in os.environ if name.startswith("SMES_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")
    with one_thread():
        yield
    stop_started()
