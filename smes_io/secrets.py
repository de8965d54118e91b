"""Show values of a configuration without the passwords that they may hold."""

import re
from typing import Any

HIDDEN = "***"
_SECRET_KEY = re.compile(r"pass|secret|token|credential|sasl|api_?key", re.IGNORECASE)
_PASSWORD = re.compile(r"(?P<user>(?<![^\s'\"=,\[/])[^\s'\":@/,]*):(?!//).*@", re.DOTALL)
_IN_QUERY = re.compile(r"(?P<key>[?&]\w*pass\w*=)[^&\s'\"]*", re.IGNORECASE)


def shown(key: str, value: Any) -> str:
    """A value for a message: its ``repr`` without passwords; a number is none.

    Args:
        key: The value's key in the file; one that is named like a secret hides the whole value.
        value: As it was read.
    """
    return repr(value) if isinstance(value, bool | int | float) else masked_text(repr(_hidden(key, value)))


def _hidden(key: str, value: Any) -> Any:
    """The value with everything hidden that lies under a key that is named like a secret."""
    if isinstance(value, dict):
        return {name: _hidden(str(name), below) for name, below in value.items()}
    return HIDDEN if _SECRET_KEY.search(key.rpartition(".")[2]) else value


def masked_text(text: str) -> str:
    """A short text with ``***`` for everything from the colon after a user name to the last ``@``.

    Rather too much is hidden than too little: a password may hold any character.
    """
    hidden = _PASSWORD.sub(rf"\g<user>:{HIDDEN}@", text)
    return _IN_QUERY.sub(rf"\g<key>{HIDDEN}", hidden)
