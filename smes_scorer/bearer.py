"""Bearer tokens (RFC 6750): where the configuration names some, the scorer says nothing of itself without one."""

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Callable, Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from smes_io.secrets import SecretError, SecretPlace
from smes_scorer.middleware import closing

LEAST_CHARACTERS = 16
_TOKEN = re.compile(rf"[A-Za-z0-9._~+/-]{{{LEAST_CHARACTERS},}}=*")
_LOOK_S = 1.0  # between two looks at whether the file has changed
_KNOWN = "smes.known"  # key of the scope

_logger = logging.getLogger(__name__)


class Tokens:
    """The tokens that callers may show. A file that changes is read again within a second, so tokens can be rotated.

    Only hashes are kept. A caller's token is compared with each of them, in a time that does not depend on either.

    Args:
        place: One token a line; empty lines, and those that begin with ``#``, are passed over.
        monotonic: Seconds.

    Raises:
        SecretError: The place cannot be read, has no token, or has one that is too short or has other characters.
    """

    def __init__(self, place: SecretPlace, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._place, self._monotonic = place, monotonic
        self._looked_s, self._stamp = monotonic(), self._file_stamp()
        self._hashes = _hashes(place)

    def accept(self, authorization: bytes) -> bool:
        """Whether an ``Authorization`` header shows a token.

        Args:
            authorization: The header's value, empty if there is none.
        """
        self._look()
        scheme, _, token = authorization.partition(b" ")
        shown = hashlib.sha256(token.strip(b" ")).digest()
        found = [hmac.compare_digest(shown, known) for known in self._hashes]  # all of them, whichever fits
        return any(found) and scheme.lower() == b"bearer"

    def _look(self) -> None:
        """Read the file again if it has changed. A file that cannot be read leaves everything as it was."""
        if self._monotonic() - self._looked_s < _LOOK_S:
            return
        self._looked_s = self._monotonic()
        stamp = self._file_stamp()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._hashes = _hashes(self._place)
        except SecretError as error:
            _logger.warning("the tokens stay as they were: %s", error)
        else:
            _logger.warning("scorer.tokens: read %d from %s, which has changed", len(self._hashes), self._place)

    def _file_stamp(self) -> tuple[int, int, int] | None:
        if self._place.file is None:
            return None
        try:
            found = self._place.file.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino


def one_token(place: SecretPlace) -> str:
    """The first of the tokens, for a caller of one's own.

    Raises:
        SecretError: As of :class:`Tokens`.
    """
    return _tokens(place)[0]


def _hashes(place: SecretPlace) -> list[bytes]:
    return [hashlib.sha256(token.encode()).digest() for token in _tokens(place)]


def _tokens(place: SecretPlace) -> list[str]:
    try:
        text = place.read()
    except SecretError as error:
        raise SecretError(f"scorer.tokens: {error}") from error
    tokens = []
    for number, line in enumerate(text.splitlines(), 1):
        token = line.strip()
        if not token or token.startswith("#"):
            continue
        if not _TOKEN.fullmatch(token):
            wanted = f"{LEAST_CHARACTERS} or more of letters, digits and -._~+/, then perhaps ="
            raise SecretError(f"scorer.tokens: {place}: line {number} is no token, expected {wanted}")
        tokens.append(token)
    if not tokens:
        raise SecretError(f"scorer.tokens: {place}: no token, expected one a line")
    return tokens


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
