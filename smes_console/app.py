"""The console as an application: the page's files, and below ``/api`` what its pages show."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files

from fastapi import FastAPI
from starlette.staticfiles import StaticFiles

from smes_console.access import Guard, tokens_of
from smes_console.config import ConsoleConfig
from smes_console.pages import experts, flow, header, learning, letters, try_it, versions
from smes_console.runs import Runs
from smes_console.sources import Places, Sources


def create_console(config: ConsoleConfig, places: Places) -> FastAPI:
    """Make the application. Nothing that it shows need be reachable yet, or ever.

    Args:
        config: Where it listens is the caller's business, who may act that of this function.
        places: Where everything is.

    Returns:
        Its ``state.tokens`` are those that count: a :class:`smes_console.access.MadeToken` where none is configured.

    Raises:
        SecretError: The configured tokens cannot be read.
    """
    tokens, sources = tokens_of(config), Sources(places)
    runs = Runs(sources)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(sources.close)

    # No /docs: FastAPI's page loads its scripts from another host.
    app = FastAPI(title="SMES Online console", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    for page in (header, versions, letters, try_it):
        app.include_router(page.router(sources))
    for page in (flow, learning, experts):  # share what was read of runs
        app.include_router(page.router(sources, runs))
    app.mount("/", StaticFiles(directory=str(files("smes_console") / "static"), html=True))
    app.add_middleware(Guard, tokens=tokens, names=(config.host, *config.hosts), private=config.private)
    app.state.tokens = tokens
    return app
