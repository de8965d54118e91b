"""Runs the scoring service until a signal stops it."""

import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from types import MappingProxyType

import torch
import uvicorn
from fastapi import FastAPI

from feature_store.config import ChunksConfig
from feature_store.signing import SigningConfig
from smes.errors import SmesError
from smes.model.devices import keep_freed_memory
from smes.model.request_kernels import compile_request_kernels
from smes.model.serving_kernels import compile_serving_kernels
from smes.model.task_kernels import compile_task_kernels
from smes.rankers.clip_kernels import compile_clip_kernels
from smes.rankers.sparse.expert_kernels import compile_expert_kernels
from smes.rankers.sparse.routing_kernels import compile_routing_kernels
from smes.schema import Schema
from smes_io.redis_access import RedisAccess
from smes_io.redis_client import connect
from smes_scorer.answer_kernels import compile_answer_kernels
from smes_scorer.app import create_app
from smes_scorer.config import ScorerConfig
from smes_scorer.connections import bounded_protocol
from smes_scorer.loading import Load, load_table_model
from smes_scorer.settled import FrozenAfterFirst

_ANSWERING_SHARE = 0.5
"""Of ``shutdown_s``: for the requests in flight. The rest is for the application's end and that of the process."""


def serve(
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
    on_listening: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve until SIGTERM or SIGINT, then finish the requests in flight and return.

    Call it in the main thread of a process: it installs signal handlers.

    Args:
        config, schema, redis_url, redis_access, namespace, signing, chunks, renamed, load: As of
            :func:`smes_scorer.app.create_app`.
        on_listening: Called with the base URL once connections are accepted.

    Raises:
        ValueError: ``fusion_weights`` names an unknown task, or the URL has a wrong form.
        FeatureStoreUnavailable: Redis gave no answer within ``redis_timeout_s``.
        SmesError: The address cannot be listened on, or the server failed to start.
    """
    torch.set_num_threads(config.torch_threads)
    keep_freed_memory()
    beside = ThreadPoolExecutor(1, "compiled-loops")  # while connections are made, and the first version is downloaded
    compiled = beside.submit(compile_answering)
    beside.shutdown(wait=False)
    app = create_app(
        config,
        schema,
        redis_url=redis_url,
        redis_access=redis_access,
        namespace=namespace,
        signing=signing,
        chunks=chunks,
        renamed=renamed,
        load=FrozenAfterFirst(load, compiled.result),
    )
    connect(redis_url, config.redis_timeout_s, access=redis_access, namespace=namespace).close()
    with closing(listen(config.host, config.port)) as listening:
        on_listening(url_of(config.host, listening))
        run_server(app, config, listening)


def run_server(app: FastAPI, config: ScorerConfig, listening: socket.socket) -> None:
    """Answer the connections of a socket until SIGTERM or SIGINT; for the main thread of a process.

    Args:
        app: What :func:`smes_scorer.app.create_app` made.
        config: Its limits.
        listening: Where connections come from.

    Raises:
        SmesError: The server failed to start.
    """
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=bounded_protocol(config, app.state.telemetry),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            # uvicorn says int, but waits for any number of seconds.
            timeout_graceful_shutdown=_ANSWERING_SHARE * config.shutdown_s,  # type: ignore[arg-type]
        )
    )
    with _repeated_signals_ignored():
        server.run(sockets=[listening])
    if not server.started:
        raise SmesError("scorer: the server failed to start")


def url_of(host: str, listening: socket.socket) -> str:
    """The URL of a listening socket."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listening.getsockname()[1]}"


def compile_answering() -> None:
    """Compile every loop that an answer needs, or load it from the disk."""
    compile_serving_kernels()
    compile_answer_kernels()
    compile_request_kernels()
    compile_clip_kernels()
    compile_routing_kernels()
    compile_expert_kernels()
    compile_task_kernels()


def listen(host: str, port: int) -> socket.socket:
    """A socket that accepts connections.

    Raises:
        SmesError: The address cannot be listened on.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise SmesError(f"scorer: cannot listen on {host}:{port}: {error.strerror or error}") from error


@contextmanager
def _repeated_signals_ignored() -> Iterator[None]:
    """Ignore the signal that uvicorn raises again after it stopped, so that the process ends with exit code 0."""
    stopping = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, frame: None) for number in stopping]
    try:
        yield
    finally:
        for number, handler in zip(stopping, before, strict=True):
            signal.signal(number, handler)
