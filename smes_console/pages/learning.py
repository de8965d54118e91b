"""What the page *learning* shows."""

from fastapi import APIRouter

from smes_console.sources import Sources


def router(sources: Sources) -> APIRouter:
    """Everything under ``/api/learning``."""
    return APIRouter(prefix="/api/learning")
