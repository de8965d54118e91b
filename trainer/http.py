"""``GET /metrics``, ``/v1/stats``, ``/v1/history`` and ``/health/…`` of a trainer, by threads of their own."""

import json
import logging
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Protocol
from urllib.parse import parse_qsl

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from smes.errors import SmesError
from smes_io.bearer import Tokens
from trainer.config import HttpConfig

LIVE_PATH, READY_PATH, METRICS_PATH = "/health/live", "/health/ready", "/metrics"
STATS_PATH, HISTORY_PATH = "/v1/stats", "/v1/history"
TOKENS_KEY = "trainer.http.tokens"
_JSON = "application/json"
_MOST_CONNECTIONS = 16
_LOOK_S = 0.1  # between two looks at a stop
_SILENT_S = 5.0  # then a connection is cut

_logger = logging.getLogger(__name__)


class Answers(Protocol):
    """Answers in JSON, see :class:`trainer.stats.TrainerStats`. Both raise :class:`ValueError` for a wrong query."""

    def stats(self, query: dict[str, str]) -> str:
        """All figures."""

    def history(self, query: dict[str, str]) -> str:
        """Lines of the metrics over time."""


class TrainerServer:
    """Listens from :meth:`start` on; what it shows may come later.

    Attributes:
        port: The port that it listens on, once it does.

    Args:
        config: Where to listen; has a port.

    Raises:
        SecretError: The tokens cannot be read.
        SmesError: The port cannot be listened on.
    """

    def __init__(self, config: HttpConfig) -> None:
        assert config.port is not None, "without a port there is no server"
        tokens = None if config.tokens is None else Tokens(config.tokens, key=TOKENS_KEY)
        try:
            self._server = _Server((config.host, config.port), _Handler)
        except OSError as error:
            raise SmesError(
                f"trainer.http: {config.host}:{config.port} cannot be listened on: {error.strerror}"
            ) from error
        self._server.tokens = tokens
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=[_LOOK_S], name="trainer-http", daemon=True
        )

    def start(self) -> None:
        """Answer from now on: live, and not ready."""
        self._thread.start()
        _logger.info("trainer.http: listening on port %d", self.port)

    def show(self, registry: CollectorRegistry, problems: Callable[[], dict[str, str]], answers: Answers) -> None:
        """Show these figures from now on: the trainer is ready."""
        self._server.problems, self._server.answers = problems, answers
        self._server.registry = registry

    def stop(self) -> None:
        """Stop listening. An answer that is being written may be cut."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    tokens: Tokens | None = None
    registry: CollectorRegistry | None = None
    problems: Callable[[], dict[str, str]] = staticmethod(dict)
    answers: Answers | None = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._free = threading.BoundedSemaphore(_MOST_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        _logger.debug("a request of %s", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout: ClassVar[float] = _SILENT_S
    server: _Server
    server_version, sys_version = "smes", ""

    def do_GET(self) -> None:
        """Answer, unless a token is needed and there is none."""
        server, (path, _, query) = self.server, self.path.partition("?")
        values = self.headers.get_all("authorization") or []
        known = server.tokens is None or server.tokens.accept(values[0].encode("latin-1") if len(values) == 1 else b"")
        if path == LIVE_PATH:
            self._answer(200, {"status": "live"})
        elif path == READY_PATH:
            self._ready(known=known)
        elif not known:
            self._answer(401, {"detail": "a bearer token is needed"})
        elif path not in (METRICS_PATH, STATS_PATH, HISTORY_PATH):
            expected = f"{METRICS_PATH}, {STATS_PATH}, {HISTORY_PATH}, {LIVE_PATH} or {READY_PATH}"
            self._answer(404, {"detail": f"expected {expected}"})
        elif server.registry is None or server.answers is None:
            self._answer(503, {"detail": "the trainer has not begun"})
        elif path == METRICS_PATH:
            self._send(200, generate_latest(server.registry), CONTENT_TYPE_LATEST)
        else:
            self._figures(server.answers.stats if path == STATS_PATH else server.answers.history, query)

    do_HEAD = do_GET

    def _figures(self, answer: Callable[[dict[str, str]], str], query: str) -> None:
        try:
            body = answer(dict(parse_qsl(query, keep_blank_values=True)))
        except ValueError as error:
            self._answer(400, {"detail": str(error)})
        else:
            self._send(200, body.encode(), _JSON)

    def _ready(self, *, known: bool) -> None:
        if self.server.registry is None:
            self._answer(503, {"status": "not ready"})
            return
        problems = self.server.problems()
        status = "degraded" if problems else "ready"
        # As the scorer does: who shows no token is not told more than he needs to route by.
        self._answer(200, {"status": status, "problems": problems} if known else {"status": "ready"})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        self._send(status, json.dumps(body).encode(), _JSON)

    def _send(self, status: int, body: bytes, content_type: str) -> None:
        self.send_response(status)
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: scrapes come every few seconds."""
