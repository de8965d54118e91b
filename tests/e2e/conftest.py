"""Each end-to-end test stops the processes that it started and restores the number of threads."""

from collections.abc import Iterator

import pytest

from tests.e2e.shop import Shop, write_shop
from tests.integration.training import one_thread
from tests.running import stop_started


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    with one_thread():
        yield
    stop_started()


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """A log in a schema that is not built in."""
    return write_shop(tmp_path_factory.mktemp("shop"))
