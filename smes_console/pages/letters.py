"""What the page *letters* shows."""

from fastapi import APIRouter

from smes_console.sources import Sources


def router(sources: Sources) -> APIRouter:
    """Everything under ``/api/letters``."""
    return APIRouter(prefix="/api/letters")
