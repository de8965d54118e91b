"""Bearer tokens (RFC 6750) of a service: where they come from, and whether a caller shows one."""

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Callable

from smes_io.secrets import SecretError, SecretPlace

LEAST_CHARACTERS = 16
SCORER_TOKENS = "scorer.tokens"
_TOKEN = re.compile(rf"[A-Za-z0-9._~+/-]{{{LEAST_CHARACTERS},}}=*")
_LOOK_S = 1.0  # between two looks at whether the file has changed

_logger = logging.getLogger(__name__)


class Tokens:
    """The tokens that callers may show. A file that changes is read again within a second, so tokens can be rotated.

    Only hashes are kept. A caller's token is compared with each of them, in a time that does not depend on either.

    Args:
        place: One token a line; empty lines, and those that begin with ``#``, are passed over.
        monotonic: Seconds.
        key: Key of the configuration that names the place, for messages.

    Raises:
        SecretError: The place cannot be read, has no token, or has one that is too short or has other characters.
    """

    def __init__(
        self, place: SecretPlace, monotonic: Callable[[], float] = time.monotonic, *, key: str = SCORER_TOKENS
    ) -> None:
        self._place, self._monotonic, self._key = place, monotonic, key
        self._looked_s, self._stamp = monotonic(), self._file_stamp()
        self._hashes = _hashes(place, key)

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
            self._hashes = _hashes(self._place, self._key)
        except SecretError as error:
            _logger.warning("the tokens stay as they were: %s", error)
        else:
            _logger.warning("%s: read %d from %s, which has changed", self._key, len(self._hashes), self._place)

    def _file_stamp(self) -> tuple[int, int, int] | None:
        if self._place.file is None:
            return None
        try:
            found = self._place.file.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino


def one_token(place: SecretPlace, *, key: str = SCORER_TOKENS) -> str:
    """The first of the tokens, for a caller of one's own.

    Args:
        place, key: As of :class:`Tokens`.

    Raises:
        SecretError: As of :class:`Tokens`.
    """
    return _tokens(place, key)[0]


def _hashes(place: SecretPlace, key: str) -> list[bytes]:
    return [hashlib.sha256(token.encode()).digest() for token in _tokens(place, key)]


def _tokens(place: SecretPlace, key: str) -> list[str]:
    try:
        text = place.read()
    except SecretError as error:
        raise SecretError(f"{key}: {error}") from error
    tokens = []
    for number, line in enumerate(text.splitlines(), 1):
        token = line.strip()
        if not token or token.startswith("#"):
            continue
        if not _TOKEN.fullmatch(token):
            wanted = f"{LEAST_CHARACTERS} or more of letters, digits and -._~+/, then perhaps ="
            raise SecretError(f"{key}: {place}: line {number} is no token, expected {wanted}")
        tokens.append(token)
    if not tokens:
        raise SecretError(f"{key}: {place}: no token, expected one a line")
    return tokens
