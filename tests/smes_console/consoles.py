"""Consoles over a real Redis, served over TCP by this process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from feature_store.config import FeatureStoreConfig
from smes_console.app import create_console
from smes_console.config import ConsoleConfig
from smes_console.sources import Places
from smes_io.schema_file import load_builtin
from smes_io.secrets import SecretPlace
from stream.log.open_log import EventLogConfig
from tests.running import until

TOKEN = "a-token-of-this-test"
NOBODY = "http://127.0.0.1:1"
"""Where nobody listens."""


def places_on(redis_url: str, namespace: str, **changes: Any) -> Places:
    """A deployment on a Redis, of the synthetic schema, without a trainer and a scorer that answer."""
    place: dict[str, Any] = {"redis_url": redis_url, "namespace": namespace}
    given: dict[str, Any] = {"trainer_url": NOBODY, "scorer_url": NOBODY, **changes}
    schema = load_builtin("synthetic")
    return Places(EventLogConfig(**place), FeatureStoreConfig(**place), schema=schema, **given)


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Serve an application; gives its URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="on", ws="none", log_config=None, access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive(), "the console listens")
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def console(places: Places, folder: Path, **config: Any) -> Iterator[httpx.Client]:
    """A client of a console whose token is :data:`TOKEN`; it shows it only where a test does.

    Args:
        places: What it shows.
        folder: For the file of the token.
        config: Of :class:`ConsoleConfig`.
    """
    tokens = folder / "tokens"
    tokens.write_text(f"{TOKEN}\n")
    with (
        served(create_console(ConsoleConfig(tokens=SecretPlace(file=tokens), **config), places)) as url,
        httpx.Client(base_url=url, timeout=30) as http,
    ):
        yield http


def bearer(token: str = TOKEN) -> dict[str, str]:
    """The header that shows a token."""
    return {"authorization": f"Bearer {token}"}
