"""A synthetic world that the integration tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from simulators.synthetic import synthesize
from tests.integration.training import one_thread
from tests.running import stop_started


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3,000 impressions, about 15 s of event time; windows are 5 s, so about two thirds get trained on."""
    path = tmp_path_factory.mktemp("world") / "world.parquet"
    synthesize(path, 3000, seed=5)
    return path


@pytest.fixture(autouse=True)
def _one_thread_and_nothing_left_running() -> Iterator[None]:
    with one_thread():
        yield
    stop_started()
