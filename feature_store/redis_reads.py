"""Reads of Redis that several parts of the store share. What a key holds, and how much, is not trusted."""

from collections.abc import Sequence

import redis

NO_STRING = b"(no string)"
"""Stands for the value of a key of another kind; :mod:`feature_store.commit_scripts` has the same text."""

_EXISTS_AT_ONCE = 200


def is_wrong_type(error: Exception) -> bool:
    """Whether Redis refused because a key holds another kind of value."""
    return isinstance(error, redis.ResponseError) and str(error).startswith("WRONGTYPE")


def beginning(client: redis.Redis, key: str, most_bytes: int) -> bytes:
    """The beginning of a string: one byte more than ``most_bytes``, so that a longer one is noticed.

    Empty if the key is missing, :data:`NO_STRING` if it holds another kind of value.
    """
    try:
        raw = client.getrange(key, 0, most_bytes)
    except redis.ResponseError as error:
        if not is_wrong_type(error):
            raise
        return NO_STRING
    assert isinstance(raw, bytes), "the client must return bytes (decode_responses=False)"
    return raw


def missing(client: redis.Redis, keys: Sequence[str]) -> int:
    """How many of these keys do not exist."""
    slices = (keys[start : start + _EXISTS_AT_ONCE] for start in range(0, len(keys), _EXISTS_AT_ONCE))
    return len(keys) - sum(int(client.exists(*some)) for some in slices)


def server_ms(client: redis.Redis) -> int:
    """The server's time, Unix milliseconds."""
    seconds, microseconds = client.time()
    return int(seconds) * 1000 + int(microseconds) // 1000
