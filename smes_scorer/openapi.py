"""The OpenAPI document of the scorer, and the page that shows it, of which nothing comes from another host."""

from collections.abc import Callable, Collection
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

from smes_scorer.interface import Interface

DOCS_PATH = "/docs"

_PAGE = Path(str(files("smes_scorer"))) / "docs_page"
_CONTENT_SECURITY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"

_EXAMPLE = {"user_id": 7, "items": [9, 10], "context": {}}
"""A request that every schema takes; the page begins with it."""


class FieldProblem(msgspec.Struct):
    """What is wrong with one field of a request, in the form that FastAPI uses."""

    type: str
    loc: list[str | int]
    msg: str


class Refusal(msgspec.Struct):
    """The body of a 422."""

    detail: list[FieldProblem]


def documented(request: str, answer: str) -> dict[str, Any]:
    """The part of the OpenAPI document that FastAPI cannot find in the function: schemas by name, and statuses."""

    def content(name: str, **more: Any) -> dict[str, Any]:
        return {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}, **more}}}

    return {
        "openapi_extra": {"requestBody": {"required": True, **content(request, example=_EXAMPLE)}},
        "responses": {
            200: content(answer),
            400: {"description": "The body cannot be parsed, or is nested deeper than max_depth"},
            408: {"description": "The body did not arrive within body_timeout_s"},
            413: {"description": "The body is larger than max_body_bytes"},
            422: {"description": "A field of the request is wrong", **content("Refusal")},
            503: {"description": "No snapshot was loaded yet, too many requests wait, or request_timeout_s is over"},
        },
    }


def add_page(app: FastAPI) -> None:
    """Serve Swagger UI, which shows the document and sends requests, under :data:`DOCS_PATH`."""

    @app.get(DOCS_PATH, include_in_schema=False)
    async def page() -> Response:
        return FileResponse(_PAGE / "index.html", headers={"content-security-policy": _CONTENT_SECURITY})

    app.mount(DOCS_PATH, StaticFiles(directory=_PAGE))


def describe_bodies(app: FastAPI, interface: Callable[[], Interface]) -> None:
    """Add the schemas of the bodies to the OpenAPI document; after every endpoint was added.

    They are those of the version in service.
    """
    plain = app.openapi()  # made once and kept by the application

    def described() -> dict[str, Any]:
        now = interface()
        structs = (now.reader.struct, now.writer.struct, now.explanation.struct, Refusal)
        _, schemas = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
        schemas["Context"]["additionalProperties"] = True  # other names are ignored and counted
        components = plain.get("components", {})
        return {**plain, "components": {**components, "schemas": {**components.get("schemas", {}), **schemas}}}

    app.openapi = described  # type: ignore[method-assign]  # as FastAPI's documentation extends it


def describe_tokens(app: FastAPI, open_paths: Collection[str]) -> None:
    """Say in the OpenAPI document who needs a token: everybody, but for these paths."""
    document = app.openapi()
    document.setdefault("components", {})["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            if path not in open_paths:
                operation["security"] = [{"bearer": []}]
                operation["responses"]["401"] = {"description": "Without a bearer token"}
