"""What the page *experts* shows."""

from fastapi import APIRouter

from smes_console.sources import Sources


def router(sources: Sources) -> APIRouter:
    """Everything under ``/api/experts``."""
    return APIRouter(prefix="/api/experts")
