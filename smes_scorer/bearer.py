"""Bearer tokens (RFC 6750): where the configuration names some, the scorer says nothing of itself without one."""

from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from smes_io.bearer import Tokens
from smes_scorer.middleware import closing

_KNOWN = "smes.known"  # key of the scope


class BearerOnly:
    """Answers 401 to a request without a token, whatever it is for, and closes the connection.

    Args:
        app: The application behind it.
        tokens: Which tokens count; None: everybody may do everything.
        open_paths: What anybody may ask for; :func:`is_known` says who asked.
    """

    def __init__(self, app: ASGIApp, tokens: Tokens | None, open_paths: Collection[str]) -> None:
        self._app, self._tokens, self._open = app, tokens, frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._tokens is None:
            await self._app(scope, receive, send)
            return
        headers = [value for name, value in scope["headers"] if name == b"authorization"]
        known = self._tokens.accept(headers[0] if len(headers) == 1 else b"")
        if not known and not (scope["path"] in self._open and scope["method"] in ("GET", "HEAD")):
            await closing(401, "a bearer token is needed", {"www-authenticate": "Bearer"})(scope, receive, send)
            return
        scope[_KNOWN] = known
        await self._app(scope, receive, send)


def is_known(scope: Scope) -> bool:
    """Whether a request came with a token, or none is needed."""
    return bool(scope.get(_KNOWN, True))
