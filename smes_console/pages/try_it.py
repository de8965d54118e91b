"""What the page *try_it* shows."""

from fastapi import APIRouter

from smes_console.sources import Sources


def router(sources: Sources) -> APIRouter:
    """Everything under ``/api/try_it``."""
    return APIRouter(prefix="/api/try_it")
