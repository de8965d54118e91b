"""Talking to a Redis server that may be away for a while: bounded retries, and errors that name the server."""

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, AuthorizationError
from redis.retry import Retry

from smes.errors import EventLogError, EventLogUnavailable

_T = TypeVar("_T")

LONGEST_BLOCK_S = 1.0
"""A blocking command asks again this often, well within every client's socket timeout."""

_BACKOFF_S = (0.02, 0.05, 0.1, 0.2, 0.5)


def connect(url: str, *, timeout_s: float) -> redis.Redis:
    """A client that has answered PING; it does not retry by itself, :class:`RedisStreamsLog` does, within its bound.

    Raises:
        ValueError: Not a Redis URL.
        EventLogUnavailable: No answer within ``timeout_s``; the message names the server, without its password.
    """
    client = redis.Redis.from_url(
        url,
        socket_connect_timeout=max(timeout_s, 0.1),
        socket_timeout=max(timeout_s, 5 * LONGEST_BLOCK_S),
        retry=Retry(NoBackoff(), 0),
    )
    try:
        retry(client, "connect", timeout_s, client.ping)
    except BaseException:
        client.close()
        raise
    return client


def retry(client: redis.Redis, what: str, timeout_s: float, call: Callable[[], _T]) -> _T:
    """Call until it succeeds; connection errors are retried for ``timeout_s``, others are not."""
    deadline = time.monotonic() + timeout_s
    attempt = 0
    while True:
        try:
            return call()
        except (AuthenticationError, AuthorizationError) as error:
            raise EventLogError(f"{server_name(client)}: {what}: {error}") from error
        except (redis.ConnectionError, redis.TimeoutError) as error:
            if time.monotonic() >= deadline:
                raise EventLogUnavailable(
                    f"{server_name(client)}: {what}: no answer within {timeout_s:g} s: {error}"
                ) from error
        except redis.RedisError as error:
            raise EventLogError(f"{server_name(client)}: {what}: {error}") from error
        pause = _BACKOFF_S[min(attempt, len(_BACKOFF_S) - 1)]
        time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
        attempt += 1


def server_name(client: redis.Redis) -> str:
    """The server in an error message; built from its address, so that no password gets in."""
    at: Mapping[str, object] = client.connection_pool.connection_kwargs
    place = at.get("path") or f"{at.get('host', 'localhost')}:{at.get('port', 6379)}"
    return f"Redis at {place} (database {at.get('db') or 0})"
