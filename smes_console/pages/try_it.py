"""What the page *Try it* shows: what a request may hold, one of the newest impressions as an example, and an answer.

Ids are integers of 64 bits, and a browser's numbers have 53. So the page sends a request as the text that the scorer is
to get, and what is larger than a browser can hold comes to it as text.
"""

import json
import time
from typing import Annotated, Any

import httpx
import numpy as np
from fastapi import APIRouter, HTTPException
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from smes.errors import SmesError
from smes.events import ImpressionBlock
from smes.schema import MISSING, Feature, Schema
from smes_console.sources import Sources
from stream.log.event_log import EventLog, TopicPartition
from stream.topics import IMPRESSIONS

_EXACT = 2**53 - 1
_ITEMS = 8
_RECORDS = 50

Value = int | float | str


class Asked(BaseModel):
    """A request for the scorer.

    Attributes:
        request: Its body, as text.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    request: Annotated[str, Field(max_length=1_000_000)]


def router(sources: Sources) -> APIRouter:
    """Everything under ``/api/try_it``."""
    routes = APIRouter(prefix="/api/try_it")
    file = sources.places.schema
    schema = None if file is None else file.schema

    @routes.get("")
    def form() -> dict[str, Any]:
        """What a request may hold, and where the scorer is."""
        ready = sources.scorer_ready()
        return {
            **ready.state(),
            "schema": None if schema is None else _described(schema),
            "url": sources.places.scorer_url,
            "needs_token": sources.places.scorer_token is not None,
        }

    @routes.get("/example")
    def example() -> dict[str, Any]:
        """A user, items and context of the newest impressions in the event log, as texts for the fields."""
        if schema is None:
            raise HTTPException(409, detail="no schema is configured; give --schema to `smes console`")

        def newest() -> dict[str, Any]:
            with sources.event_log() as log:
                block = _newest_impressions(log, schema)
            if block is None:
                raise SmesError("the event log has no impression of this schema")
            return _example(block, schema)

        found = sources.look("newest impressions", newest)
        return {**found.state(), "at_ms": found.at_ms, "example": found.value}

    @routes.post("/explain")
    def explain(asked: Asked) -> Any:
        """The scorer's answer to a request, with which experts answered and where each feature came from."""
        try:
            request = json.loads(asked.request)
        except (ValueError, RecursionError) as error:
            raise HTTPException(422, detail=f"the request is no JSON: {error}") from error
        started_s = time.perf_counter()
        try:
            response = sources.ask_scorer("/v1/explain", request)
        except SmesError as error:
            raise HTTPException(503, detail=str(error)) from error
        except ValueError as error:  # Python reads NaN, 1e999 and half a surrogate pair, which JSON does not have
            raise HTTPException(422, detail=f"the request is no JSON: {error}") from error
        took_ms = 1000 * (time.perf_counter() - started_s)
        if response.status_code != 200:
            return _refusal(response)
        return {"took_ms": took_ms, "answer": _exact(response.json())}

    return routes


def _refusal(response: httpx.Response) -> JSONResponse:
    """What the scorer said, except that its own token is none of this page's."""
    if response.status_code in (401, 403):
        detail = "the scorer wants another token; see console.scorer_token"
        return JSONResponse({"detail": detail}, 502)
    try:
        detail = response.json()["detail"]
    except (ValueError, KeyError, TypeError):
        detail = f"the scorer answered with status {response.status_code}: {response.text[:300]}"
    return JSONResponse({"detail": detail}, response.status_code)


def _described(schema: Schema) -> dict[str, Any]:
    names = schema.history_sequences
    return {
        "context": [
            {
                "name": f.name,
                "kind": f.kind,
                "max_length": f.max_length if f.is_list else None,
                "accompanies": f.accompanies,
                "history": f.name in names,
            }
            for f in schema.features
            if f.source == "context"
        ],
    }


def _newest_impressions(log: EventLog, schema: Schema) -> ImpressionBlock | None:
    """Those of one partition's last records; None where no partition has any."""
    from stream.codec.codec import decode

    begin = log.begin(IMPRESSIONS)
    for at, end in sorted(log.end(IMPRESSIONS).items()):
        fetch = log.read(_last(at, begin[at], end), max_records=_RECORDS, timeout_s=0.5)
        block = decode(fetch.records, schema).impressions
        if len(block):
            return block
    return None


def _last(at: TopicPartition, begin: int, end: int) -> dict[TopicPartition, int]:
    return {at: max(begin, end - _RECORDS)}


def _example(block: ImpressionBlock, schema: Schema) -> dict[str, Any]:
    newest = int(block.event_time_ms.argmax())
    same = block.user_id == block.user_id[newest]
    by_nearness = np.concatenate([[newest], np.flatnonzero(same)[::-1], np.flatnonzero(~same)[::-1]])
    items = list(dict.fromkeys(block.item_id[by_nearness].tolist()))[:_ITEMS]
    values = {f.name: _text(_value(block, schema, f, newest)) for f in schema.features if f.source == "context"}
    return {
        "user_id": str(int(block.user_id[newest])),
        "items": [str(item) for item in items],
        "context": {name: text for name, text in values.items() if text},
        "event_time_ms": int(block.event_time_ms[newest]),
    }


def _value(block: ImpressionBlock, schema: Schema, feature: Feature, row: int) -> list[Value]:
    if feature.kind == "numeric":
        number = block.numerics[row, schema.numeric_features.index(feature)]
        return [] if np.isnan(number) else [str(number)]  # the shortest text of this float32
    columns = block.ids[row, schema.id_slices[feature.name]]
    return [value for value in columns.tolist() if value != MISSING]


def _text(values: list[Value]) -> str:
    return ", ".join(map(str, values))


def _exact(value: Any) -> Any:
    """The value with integers as text that a browser cannot hold."""
    if isinstance(value, dict):
        return {key: _exact(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_exact(each) for each in value]
    return str(value) if isinstance(value, int) and abs(value) > _EXACT else value
