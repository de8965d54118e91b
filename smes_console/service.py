"""Runs the console until a signal stops it."""

import ipaddress
import logging
import signal
import socket
from collections.abc import Callable
from contextlib import closing

import uvicorn

from smes.errors import SmesError
from smes_console.access import MadeToken
from smes_console.app import create_console
from smes_console.config import ConsoleConfig
from smes_console.sources import Places

_MOST_CONNECTIONS = 128
_ENDS_WITHIN_S = 2

_logger = logging.getLogger(__name__)


def serve(config: ConsoleConfig, places: Places, *, on_listening: Callable[[str, str | None], None]) -> None:
    """Serve until SIGTERM or SIGINT.

    Call it in the main thread of a process: it installs signal handlers.

    Args:
        config: Where to listen, and who may act.
        places: Where everything is.
        on_listening: Called with the base URL, and with the token where one was made, once connections are accepted.

    Raises:
        SecretError: The configured tokens cannot be read.
        SmesError: The address cannot be listened on, or the server failed to start.
    """
    # The page says what is away; every look that tries again would say so, too.
    logging.getLogger("smes_io.stopping").setLevel(logging.ERROR)
    app = create_console(config, places)
    if not config.private and not _only_here(config.host):
        _logger.warning(
            "console.host: everybody who reaches %s may read what the console shows; see console.private", config.host
        )
    with closing(_listen(config.host, config.port)) as listening:
        host = f"[{config.host}]" if ":" in config.host else config.host
        made = app.state.tokens.token if isinstance(app.state.tokens, MadeToken) else None
        on_listening(f"http://{host}:{listening.getsockname()[1]}", made)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=_MOST_CONNECTIONS,
                timeout_graceful_shutdown=_ENDS_WITHIN_S,
            )
        )
        # uvicorn raises the signal again after it has stopped: then the process ends with exit code 0 all the same.
        before = {number: signal.signal(number, _nothing) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            server.run(sockets=[listening])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if not server.started:
        raise SmesError("console: the server failed to start")


def _nothing(number: int, frame: object) -> None:
    pass


def _only_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise SmesError(f"console: cannot listen on {host}:{port}: {error.strerror or error}") from error
