"""What the head of every page shows: the deployment, the version in service, and what is wrong."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter

from smes_console.deployment import alarms, in_service
from smes_console.sources import Sources
from smes_io.clock import wall_clock_ms


def router(sources: Sources) -> APIRouter:
    """``/api/header``."""
    routes = APIRouter(prefix="/api/header")
    schema = sources.places.schema

    @routes.get("")
    def header() -> dict[str, Any]:
        wrong = alarms(sources)  # first: it looks at everything at once
        return {
            "at_ms": wall_clock_ms(),
            "namespace": sources.places.feature_store.namespace,
            "schema": None if schema is None else schema.name,
            "in_service": in_service(sources),
            "alarms": [asdict(alarm) for alarm in wrong],
        }

    @routes.post("/token")
    def token() -> dict[str, bool]:
        """Whether the token counts: who shows none, or a wrong one, does not come here."""
        return {"accepted": True}

    return routes
