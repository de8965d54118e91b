"""The scorer's HTTP interface.

``POST /v1/score`` and ``/v1/explain``; ``GET /v1/stats``, ``/health/live``, ``/health/ready``, ``/metrics`` and
``/docs``.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.message import Message
from functools import partial
from types import MappingProxyType

import msgspec
import redis
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from feature_store.config import ChunksConfig
from feature_store.entities import EntityStore
from feature_store.item_cache import ItemCache
from feature_store.signing import SigningConfig
from smes.errors import SmesError
from smes.schema import Schema
from smes_io.bearer import Tokens
from smes_io.redis_access import RedisAccess
from smes_io.redis_client import open_client
from smes_scorer.answer import Answerer, NotReady
from smes_scorer.arms import Arms
from smes_scorer.bearer import BearerOnly, is_known
from smes_scorer.config import ScorerConfig, check_names
from smes_scorer.feature_lookup import FeatureLookup, StoreChecks
from smes_scorer.interface import Interface, Interfaces
from smes_scorer.loading import Load, load_table_model
from smes_scorer.middleware import BodyLimit, EndsQuietly, Metered, RequestMeter, TimeLimit
from smes_scorer.openapi import FieldProblem, Refusal, add_page, describe_bodies, describe_tokens, documented
from smes_scorer.request import FieldError, UnreadableBody
from smes_scorer.scoring_queue import Busy, Dropped, ScoringQueue, Work, one_by_one
from smes_scorer.source import Open, Source, Wanted, loaded_here
from smes_scorer.telemetry import Telemetry
from smes_scorer.versions import InService, ServedModel

SCORE_PATH, EXPLAIN_PATH = "/v1/score", "/v1/explain"
LIVE_PATH, READY_PATH = "/health/live", "/health/ready"

_CLOSING_SHARE = 0.2
"""Of ``shutdown_s``: for the application's own end, after the requests in flight."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Parts:
    """What the endpoints use."""

    config: ScorerConfig
    telemetry: Telemetry
    source: Source
    features: FeatureLookup
    store_checks: StoreChecks
    answerer: Answerer
    queue: ScoringQueue
    clients: tuple[redis.Redis, ...]

    def start(self) -> None:
        """Start loading."""
        for one in (*self.source.runs, self.store_checks):
            one.start()

    def close(self) -> None:
        """Stop the threads and close the connections, in a part of ``shutdown_s``."""
        # A load ends at its next chunk. Where that takes long, nobody waits for it.
        stopping = [threading.Thread(target=one.stop, daemon=True) for one in (*self.source.runs, self.store_checks)]
        for thread in stopping:
            thread.start()
        self.queue.close()
        until_s = time.monotonic() + _CLOSING_SHARE * self.config.shutdown_s
        for thread in stopping:
            thread.join(max(0.0, until_s - time.monotonic()))
        self.source.arms.close()
        for client in (*self.source.clients, *self.clients):
            client.close()


def create_app(
    config: ScorerConfig,
    schema: Schema,
    *,
    redis_url: str,
    redis_access: RedisAccess | None = None,
    namespace: str = "smes",
    signing: SigningConfig | None = None,
    chunks: ChunksConfig | None = None,
    renamed: Mapping[str, str] = MappingProxyType({}),
    load: Load = load_table_model,
    source: Open | None = None,
) -> FastAPI:
    """Make the application. While it runs it loads each new snapshot; Redis need not be reachable yet.

    Args:
        config: See :class:`ScorerConfig`.
        schema: Features and tasks, until a version is in service whose weights were carried over from this schema to
            another one; snapshots of any other schema are refused.
        redis_url: Where snapshots and features are.
        redis_access: How Redis lets us in, beside what the URL says.
        namespace: Prefix of their keys.
        signing: Keys by which snapshots are verified; None: they are not.
        chunks: Where the snapshots' chunks are; None: in Redis.
        renamed: Feature → its name before, by which older rows in the store have it.
        load: Builds a model from snapshots' payloads.
        source: Where versions come from; None: from Redis, by the arguments before.

    Raises:
        ValueError: ``fusion_weights`` names an unknown task, or the URL has a wrong form.
        SecretError: The tokens or the keys cannot be read.
    """
    tokens, open_paths = None if config.tokens is None else Tokens(config.tokens), (LIVE_PATH, READY_PATH)

    def connected(timeout_s: float, of: str) -> redis.Redis:
        return open_client(redis_url, timeout_s, access=redis_access, namespace=of)

    if source is None:
        client = partial(connected, config.redis_timeout_s)
        source = loaded_here(client, namespace, signing or SigningConfig(), chunks or ChunksConfig(), load)
    parts = _assemble(config, schema, partial(connected, config.entity_timeout_ms / 1000), namespace, renamed, source)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        parts.start()
        yield
        await asyncio.to_thread(parts.close)

    app = FastAPI(title="SMES Online scorer", lifespan=lifespan, docs_url=None, redoc_url=None)
    _add_scoring(app, parts)
    _add_insight(app, parts)
    if tokens is not None:
        describe_tokens(app, open_paths)
    describe_bodies(app, lambda: parts.answerer.interface)
    add_page(app)
    app.add_middleware(BodyLimit, max_body_bytes=config.max_body_bytes, body_timeout_s=config.body_timeout_s)
    app.add_middleware(TimeLimit, request_timeout_s=config.request_timeout_s)
    app.add_middleware(BearerOnly, tokens=tokens, open_paths=open_paths)
    app.add_middleware(EndsQuietly)
    app.add_middleware(RequestMeter, path=SCORE_PATH, telemetry=parts.telemetry)  # outermost: sees the 413s too
    app.state.telemetry = parts.telemetry
    return app


def _assemble(
    config: ScorerConfig,
    schema: Schema,
    connected: Callable[[str], redis.Redis],
    namespace: str,
    renamed: Mapping[str, str],
    open_source: Open,
) -> _Parts:
    telemetry, entities = Telemetry(), connected(namespace)
    features = FeatureLookup(telemetry, retry_s=config.entity_retry_s)

    renames = {schema.hash: renamed}

    def open_features(schema: Schema) -> EntityStore:
        cache = ItemCache(config.entity_cache_bytes, config.entity_cache_s) if config.entity_cache_bytes else None
        opened = EntityStore(entities, schema, namespace, renamed=renames.get(schema.hash), cache=cache)
        opened.damage.on_new = telemetry.refused.note
        return opened

    def on_schema(schema: Schema, renamed: Mapping[str, str]) -> None:
        renames[schema.hash] = renamed
        interfaces.of(schema)  # made now, and not by the first request

    def on_served(served: ServedModel) -> None:
        interfaces.of(served.schema).served.compare(served.manifest.metrics)

    check_names(config, schema)
    interfaces = Interfaces(config, open_features, features, telemetry)
    source = open_source(Wanted(config, schema, interfaces, telemetry, on_schema, on_served))
    swap = source.swap
    answerer = Answerer(interfaces, swap, source.first_answers, telemetry, arms=source.arms)
    checks = StoreChecks(lambda: _check_store(features, answerer.interface), config.entity_check_s)
    telemetry.loader_alive.set_function(lambda: float(source.loads()))
    telemetry.snapshot_age_s.set_function(lambda: _age_s(swap) or 0.0)
    telemetry.degraded.set_function(
        lambda: float(not swap.served or any(_problems(source, features, answerer).values()))
    )
    telemetry.store_damage.set_function(lambda: source.damage() + interfaces.damage_count)
    queue = ScoringQueue(config.workers, config.max_waiting, config.max_age_s, config.max_together)
    telemetry.waiting.set_function(lambda: queue.depth)
    return _Parts(config, telemetry, source, features, checks, answerer, queue, (entities,))


def _add_scoring(app: FastAPI, parts: _Parts) -> None:
    explanations = one_by_one(parts.answerer.explain)

    @app.post(SCORE_PATH, **documented("ScoreRequest", "Answer"))
    async def score(request: Request) -> Response:
        """Score and rank items for a user, all by one version of the weights."""
        return await _answered(request, parts.queue, parts.answerer.answer_all)

    @app.post(EXPLAIN_PATH, **documented("ScoreRequest", "Explanation"))
    async def explain(request: Request) -> Response:
        """Score at most 50 items as `/v1/score` does, and say which experts answered and which features were found.

        For people: it takes longer, and counts neither as a request nor for freshness.
        """
        return await _answered(request, parts.queue, explanations)


async def _answered(request: Request, queue: ScoringQueue, work: Work) -> Response:
    """The answer to a scoring request, or why there is none."""
    body = await request.body()
    try:
        _check_content_type(request, body)
        answered = await queue.run(work, body, partial(_left, request))
    except FieldError as error:
        refusal = Refusal([FieldProblem(error.kind, list(error.loc), str(error))])
        return Response(msgspec.json.encode(refusal), 422, media_type="application/json")
    except UnreadableBody as error:
        raise HTTPException(400, detail=str(error)) from error
    except NotReady as error:
        raise HTTPException(503, detail=f"not ready: {error}", headers={"Retry-After": "1"}) from error
    except (Busy, Dropped) as error:
        left = isinstance(error, Dropped) and error.left
        Metered.of(request.scope).outcome = "busy" if isinstance(error, Busy) else "dropped"
        # 499 as nginx calls it: nobody reads it.
        raise HTTPException(499 if left else 503, detail=f"busy: {error}", headers={"Retry-After": "1"}) from error
    except Exception as error:
        # Answered here: an exception that reaches the server would also cost the client its connection.
        _logger.exception("a request could not be scored")
        detail = str(error) if isinstance(error, SmesError) else "scoring failed; the scorer's log says why"
        raise HTTPException(500, detail=detail) from error
    return Response(answered, media_type="application/json")


async def _left(request: Request) -> None:
    """Wait until the caller of a request, whose body was read, leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _check_content_type(request: Request, body: bytes) -> None:
    """Refuse a body whose header does not say JSON.

    FastAPI does the same where it parses the body: a web page of another origin cannot send this header without the
    browser asking first (CORS).
    """
    content_type = request.headers.get("content-type", "")
    if content_type == "application/json" or not body:
        return
    parsed = Message()
    parsed["content-type"] = content_type
    subtype = parsed.get_content_subtype()
    if (
        not content_type
        or parsed.get_content_maintype() != "application"
        or not (subtype == "json" or subtype.endswith("+json"))
    ):
        raise FieldError(("body",), f"content-type: {content_type!r}, expected application/json")


def _add_insight(app: FastAPI, parts: _Parts) -> None:
    @app.get(LIVE_PATH, responses={500: {"description": "The snapshot loader died"}})
    async def live() -> Response:
        """200 while the process works, 500 if its snapshot loader has died."""
        alive = parts.source.alive()
        return JSONResponse({"status": "alive" if alive else "the snapshot loader died"}, 200 if alive else 500)

    @app.get(READY_PATH, responses={503: {"description": "No snapshot was loaded yet"}})
    async def ready(request: Request) -> Response:
        """503 before the first snapshot, then 200. ``degraded``: requests are answered, but with the problems named.

        ``refused``: what was refused since the start, by reason, whether or not it is over.

        Where a token is needed, one learns no more than the status without it.
        """
        source = parts.source
        served = source.swap.served
        if not is_known(request.scope):
            return JSONResponse({"status": "ready" if served else "not ready"}, 200 if served else 503)
        problems = _problems(source, parts.features, parts.answerer)
        status = "not ready" if served is None else "degraded" if any(problems.values()) else "ready"
        served_now, shown = _served(source.swap), _shown(source.arms)
        body = {"status": status, **served_now, "problems": problems, "refused": source.refused(), **shown}
        return JSONResponse(body, 503 if not served else 200)

    @app.get("/v1/stats")
    async def stats() -> Response:
        """Counters and quantiles since the start, and rates of the last ten seconds; times in milliseconds."""
        source = parts.source
        summary = await asyncio.to_thread(source.summary)  # which may ask other processes
        return JSONResponse({**_served(source.swap), **summary, **_shown(source.arms)})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics(request: Request) -> Response:
        """All counters, gauges and histograms, for Prometheus."""
        return Response(await asyncio.to_thread(parts.source.metrics), media_type=CONTENT_TYPE_LATEST)


def _check_store(features: FeatureLookup, interface: Interface) -> None:
    features.check(interface.store, interface.schema)


def _problems(source: Source, features: FeatureLookup, answerer: Answerer) -> dict[str, str | None]:
    """What is wrong with what; None where nothing is."""
    interface = answerer.interface
    further = {"skew": interface.served.problem, "configuration": interface.problem}
    further |= {f"arms.{arm.name}": arm.problem for arm in source.arms} | dict(source.problems())
    always = {"snapshots": source.swap.problem, "features": features.problem}
    return always | {name: problem for name, problem in further.items() if problem is not None}


def _shown(arms: Arms) -> dict[str, object]:
    """What is said of the arms, where there are any."""
    return {"arms": {arm.name: arm.summary() for arm in arms}} if arms.any else {}


def _served(swap: InService) -> dict[str, object]:
    served, age_s = swap.served, _age_s(swap)
    return {
        "lineage": served.manifest.lineage if served else None,
        "version": served.manifest.version if served else None,
        "step": served.manifest.step if served else None,
        "snapshot_age_ms": None if age_s is None else round(age_s * 1000),
    }


def _age_s(swap: InService) -> float | None:
    served = swap.served
    return None if served is None else max(0.0, time.time() - served.manifest.created_ms / 1000)
