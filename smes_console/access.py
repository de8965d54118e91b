"""Who may do what: writing needs a bearer token, reading does too where the console is private.

One guard stands before the whole application, so that no page can forget it: whatever is not GET or HEAD needs a token.
The token comes in the ``Authorization`` header and never in a cookie, so a page of somebody else cannot make a browser
send it (CSRF).
"""

import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Iterable
from typing import Protocol

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from smes_console.config import ConsoleConfig
from smes_io.bearer import Tokens

TOKENS_KEY = "console.tokens"
API = "/api/"
_READING = ("GET", "HEAD")
_HEADERS = {
    # Only what the console itself serves is loaded, run or asked, and no other page may frame it.
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Accepts(Protocol):
    """Knows which tokens count."""

    def accept(self, authorization: bytes) -> bool:
        """Whether an ``Authorization`` header shows a token."""


class MadeToken:
    """A token for one run of the console.

    Attributes:
        token: To be shown in the address that is printed.
    """

    def __init__(self) -> None:
        self.token = secrets.token_urlsafe(24)
        self._hash = hashlib.sha256(self.token.encode()).digest()

    def accept(self, authorization: bytes) -> bool:
        """Whether an ``Authorization`` header shows the token."""
        scheme, _, token = authorization.partition(b" ")
        shown = hashlib.sha256(token.strip(b" ")).digest()
        return hmac.compare_digest(shown, self._hash) and scheme.lower() == b"bearer"


def tokens_of(config: ConsoleConfig) -> Tokens | MadeToken:
    """The configured tokens, or a new one.

    Raises:
        SecretError: The configured ones cannot be read.
    """
    return MadeToken() if config.tokens is None else Tokens(config.tokens, key=TOKENS_KEY)


class Guard:
    """Refuses requests for another host's name, and those without a token that need one.

    Args:
        app: The application behind it.
        tokens: Which tokens count.
        names: Names of the host, beside ``localhost`` and IP addresses.
        private: Whether everything under ``/api/`` needs a token; else only what is not GET or HEAD.
    """

    def __init__(self, app: ASGIApp, tokens: Accepts, names: Iterable[str], *, private: bool) -> None:
        self._app, self._tokens, self._private = app, tokens, private
        self._names = {"localhost", *(name.lower().rstrip(".") for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                # Figures are of the moment; the page's own files are asked for anew, and answered "not modified".
                headers["cache-control"] = "no-store" if scope["path"].startswith(API) else "no-cache"
            await send(message)

        refusal = self._refusal(scope)
        await (refusal or self._app)(scope, receive, with_headers)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        hosts = _values(scope, b"host")
        if len(hosts) != 1 or not self._ours(hosts[0].decode("latin-1")):
            named = ", ".join(sorted(self._names))
            detail = f"host: expected one of {named}, or an IP address; console.hosts adds names"
            return JSONResponse({"detail": detail}, 421)
        needed = scope["method"] not in _READING or (self._private and scope["path"].startswith(API))
        shown = _values(scope, b"authorization")
        if needed and not self._tokens.accept(shown[0] if len(shown) == 1 else b""):
            return JSONResponse({"detail": "a bearer token is needed"}, 401, {"www-authenticate": "Bearer"})
        return None

    def _ours(self, host: str) -> bool:
        """Whether a browser that asks for this host means this one: no name of somebody else leads to it."""
        name = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
        if name.lower().rstrip(".") in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _values(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]
