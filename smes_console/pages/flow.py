"""What the page *Flow* shows: where everything is on its way from event to answer, and how fast it moves."""

from fastapi import APIRouter

from smes_console.sources import Sources


def router(sources: Sources) -> APIRouter:
    """Everything under ``/api/flow``."""
    return APIRouter(prefix="/api/flow")
