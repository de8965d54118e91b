"""The HTTP face of the scorer.

``POST /v1/score``, ``GET /v1/stats``, ``GET /health/live``, ``GET /health/ready``, ``GET /metrics``.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import redis
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from feature_store.entities import EntityStore
from feature_store.snapshots import SnapshotStore
from feature_store.watcher import SnapshotWatcher
from smes.errors import SmesError
from smes.schema import Schema
from smes_io.redis_client import open_client
from smes_scorer.answer import Answerer, FeatureLookup, NotReady
from smes_scorer.config import ScorerConfig, fusion_weights
from smes_scorer.first_answers import FirstAnswers
from smes_scorer.hot_swap import HotSwap
from smes_scorer.http_guard import BodyLimit, RequestMeter
from smes_scorer.request import FieldError, ScoreRequest
from smes_scorer.served import Load, load_serving_model
from smes_scorer.telemetry import Telemetry

SCORE_PATH = "/v1/score"

_logger = logging.getLogger(__name__)

_EXAMPLE = {
    "lineage": "a1b2",
    "version": 1200,
    "items": [{"item_id": 7, "scores": {"click": 0.31, "watch_time_s": 12.5}, "fused": 0.31}],
    "ranking": [7],
}


@dataclass(frozen=True)
class _Parts:
    """What the endpoints need."""

    config: ScorerConfig
    telemetry: Telemetry
    swap: HotSwap
    features: FeatureLookup
    answerer: Answerer
    pool: ThreadPoolExecutor
    clients: tuple[redis.Redis, ...]

    def close(self) -> None:
        self.swap.stop()
        self.pool.shutdown()
        for client in self.clients:
            client.close()


def create_app(
    config: ScorerConfig,
    schema: Schema,
    *,
    redis_url: str,
    namespace: str = "smes",
    load: Load = load_serving_model,
) -> FastAPI:
    """The application; its lifespan follows the snapshots. Redis need not be reachable yet.

    Args:
        config: See :class:`ScorerConfig`.
        schema: Features and tasks; snapshots and features of another schema are refused.
        redis_url: Where snapshots and features are.
        namespace: Prefix of their keys.
        load: Builds a model from a snapshot's payload.

    Raises:
        ValueError: ``fusion_weights`` names an unknown task, or the URL has a wrong form.
    """
    parts = _assemble(config, schema, redis_url, namespace, load)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        parts.swap.start()
        yield
        await asyncio.to_thread(parts.close)

    app = FastAPI(title="SMES Online scorer", lifespan=lifespan)
    app.add_exception_handler(RequestValidationError, _invalid)
    _add_scoring(app, parts)
    _add_insight(app, parts)
    app.add_middleware(BodyLimit, max_body_bytes=config.max_body_bytes)
    app.add_middleware(RequestMeter, path=SCORE_PATH, telemetry=parts.telemetry)  # outermost: sees the 413s too
    return app


def _assemble(config: ScorerConfig, schema: Schema, redis_url: str, namespace: str, load: Load) -> _Parts:
    telemetry, first_answers = Telemetry(), FirstAnswers()
    snapshots = open_client(redis_url, config.redis_timeout_s)
    entities = open_client(redis_url, config.entity_timeout_ms / 1000)
    swap = HotSwap(
        SnapshotStore(snapshots, namespace),
        SnapshotWatcher(snapshots, namespace, config.poll_s),
        schema,
        load,
        first_answers,
        telemetry,
        poll_s=config.poll_s,
    )
    features = FeatureLookup(EntityStore(entities, schema, namespace), schema, telemetry, retry_s=config.entity_retry_s)
    weights = fusion_weights(config, schema)
    answerer = Answerer(schema, weights, config.max_items, swap, features, first_answers, telemetry)
    telemetry.snapshot_age_s.set_function(lambda: _age_s(swap) or 0.0)
    # A few threads of its own: more would only take the processor from each other (and from the trainer).
    pool = ThreadPoolExecutor(config.workers, thread_name_prefix="score")
    return _Parts(config, telemetry, swap, features, answerer, pool, (snapshots, entities))


async def _invalid(request: Request, error: Exception) -> Response:
    """422 that names the fields; without the input, which FastAPI would send back whole (and fail to if it is NaN)."""
    assert isinstance(error, RequestValidationError)
    return JSONResponse({"detail": [{key: e[key] for key in ("type", "loc", "msg")} for e in error.errors()]}, 422)


def _add_scoring(app: FastAPI, parts: _Parts) -> None:
    described: dict[int | str, dict[str, Any]] = {
        413: {"description": "The body is larger than max_body_bytes"},
        503: {"description": "No snapshot was loaded yet"},
        200: {"content": {"application/json": {"example": _EXAMPLE}}},
    }

    @app.post(SCORE_PATH, responses=described)
    async def score(request: ScoreRequest) -> Response:
        """Score and rank items for a user, all by one version of the weights."""
        try:
            body = await asyncio.get_running_loop().run_in_executor(parts.pool, parts.answerer.answer, request)
        except FieldError as error:
            raise HTTPException(
                422, detail=[{"type": "value_error", "loc": list(error.loc), "msg": str(error)}]
            ) from error
        except NotReady as error:
            raise HTTPException(503, detail=f"not ready: {error}", headers={"Retry-After": "1"}) from error
        except Exception as error:
            # Answered here: an exception that reaches the server would also cost the client its connection.
            _logger.exception("a request could not be scored")
            detail = str(error) if isinstance(error, SmesError) else "scoring failed; the scorer's log says why"
            raise HTTPException(500, detail=detail) from error
        return Response(body, media_type="application/json")


def _add_insight(app: FastAPI, parts: _Parts) -> None:
    @app.get("/health/live")
    async def live() -> Response:
        """Whether the process works: 200, or 500 if its snapshot loader has died."""
        alive = parts.swap.alive
        return JSONResponse({"status": "alive" if alive else "the snapshot loader died"}, 200 if alive else 500)

    @app.get("/health/ready")
    async def ready() -> Response:
        """Whether requests can be answered: 503 before the first snapshot. ``degraded``: answers, but see why."""
        served = parts.swap.served
        problems = {"snapshots": parts.swap.problem, "features": parts.features.problem}
        status = "not ready" if served is None else "degraded" if any(problems.values()) else "ready"
        return JSONResponse({"status": status, **_served(parts.swap), "problems": problems}, 503 if not served else 200)

    @app.get("/v1/stats")
    async def stats() -> Response:
        """Counters and quantiles since the start; times in ms."""
        return JSONResponse({**_served(parts.swap), **parts.telemetry.summary()})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        """The same and more, for Prometheus."""
        return Response(generate_latest(parts.telemetry.registry), media_type=CONTENT_TYPE_LATEST)


def _served(swap: HotSwap) -> dict[str, object]:
    served, age_s = swap.served, _age_s(swap)
    return {
        "lineage": served.manifest.lineage if served else None,
        "version": served.manifest.version if served else None,
        "step": served.manifest.step if served else None,
        "snapshot_age_ms": None if age_s is None else round(age_s * 1000),
    }


def _age_s(swap: HotSwap) -> float | None:
    served = swap.served
    return None if served is None else max(0.0, time.time() - served.manifest.created_ms / 1000)
