"""Secrets: where they are read from, and how values of a configuration are shown without the passwords they may hold.

A configuration names the place of a secret (:class:`SecretPlace`) and never holds the secret itself. So no message,
report, printed configuration or process list can show it. The one exception is a password inside a URL, which is
masked wherever it is shown.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smes.errors import SmesError

HIDDEN = "***"
_SECRET_KEY = re.compile(r"pas|pwd|secret|token|credential|sasl|api_?key", re.IGNORECASE)
_PASSWORD = re.compile(r"(?P<user>(?<![^\s'\"=,\[/])[^\s'\":@/,]*):(?!//).*@", re.DOTALL)
_IN_QUERY = re.compile(r"(?P<key>[?&]\w*pass\w*=)[^&\s'\"]*", re.IGNORECASE)
_MOST_BYTES = 64 * 1024


class SecretError(SmesError):
    """A secret cannot be read from its place. The message names the place, and nothing of what is there."""


@dataclass(frozen=True)
class SecretPlace:
    """Where a secret is read from: one of the two. It is read again for every new connection, so that it may change.

    Attributes:
        file: A file with the secret in UTF-8. One line end behind it is no part of it.
        env: Name of an environment variable. Do not let the name begin with ``SMES_``: those override keys.
    """

    file: Path | None = None
    env: str | None = None

    def __post_init__(self) -> None:
        if (self.file is None) == (self.env is None):
            raise ValueError("expected one of file and env: the place of a secret, not the secret itself")

    def __str__(self) -> str:
        return f"file {self.file}" if self.file is not None else f"environment variable {self.env}"

    def read(self) -> str:
        """The secret.

        Raises:
            SecretError: There is none, it is empty, or it is no text of at most 64 KiB.
        """
        text = self._variable() if self.file is None else self._content(self.file)
        if not text:
            raise SecretError(f"{self}: empty, expected a secret")
        return text

    def _variable(self) -> str:
        text = os.environ.get(self.env or "")
        if text is None:
            raise SecretError(f"{self}: not set, expected a secret")
        return text

    def _content(self, path: Path) -> str:
        try:
            with path.open("rb") as file:
                data = file.read(_MOST_BYTES + 1)
        except OSError as error:
            raise SecretError(f"{self}: cannot be read: {error.strerror}") from error
        if len(data) > _MOST_BYTES:
            raise SecretError(f"{self}: over {_MOST_BYTES} bytes, expected a secret")
        try:
            return data.decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError:
            raise SecretError(f"{self}: expected text in UTF-8") from None  # the error itself would hold the secret


def shown(key: str, value: Any) -> str:
    """A value for a message: its ``repr`` without passwords; a number is none.

    Args:
        key: The value's key in the file; if a part of it is named like a secret, the whole value is hidden.
        value: As it was read.
    """
    return repr(value) if isinstance(value, bool | int | float) else masked_text(repr(_hidden(key, value)))


def _hidden(key: str, value: Any) -> Any:
    """The value with everything hidden that lies under a key that is named like a secret."""
    if isinstance(value, dict):
        return {name: _hidden(str(name), below) for name, below in value.items()}
    return HIDDEN if _SECRET_KEY.search(key) else value


def masked_text(text: str) -> str:
    """A short text with ``***`` for everything from the colon after a user name to the last ``@``.

    Rather too much is hidden than too little: a password may hold any character.
    """
    hidden = _PASSWORD.sub(rf"\g<user>:{HIDDEN}@", text)
    return _IN_QUERY.sub(rf"\g<key>{HIDDEN}", hidden)
