"""Connections to Redis with every wait bounded, and its errors in the project's terms."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar
from urllib.parse import urlsplit, urlunsplit

import redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, AuthorizationError
from redis.retry import Retry

from smes.errors import EventLogError, EventLogUnavailable, FeatureStoreError, FeatureStoreUnavailable

_PAUSE_S = 0.1


def open_client(url: str, timeout_s: float) -> redis.Redis:
    """A client that connects on first use; safe to share between threads.

    Args:
        url: ``redis://[user[:password]@]host:port[/db]``, ``rediss://…`` or ``unix://path``.
        timeout_s: Longest wait for a connection and for an answer, each.

    Raises:
        ValueError: The URL has another form, or the timeout is not positive.
    """
    if not timeout_s > 0:
        raise ValueError(f"Redis timeout {timeout_s} s, expected more than 0")
    try:
        return redis.Redis.from_url(
            url,
            socket_connect_timeout=timeout_s,
            socket_timeout=timeout_s,
            # One retry, because the server may have closed an idle connection; never one after a timeout, which
            # would double the wait.
            retry=Retry(NoBackoff(), 1, (redis.ConnectionError,)),
        )
    except ValueError as error:
        raise ValueError(f"Redis URL {masked(url)!r}: {error}") from error


def connect(url: str, timeout_s: float) -> redis.Redis:
    """A client whose server has answered.

    A server that is starting (refusing connections, loading its data) is asked again until ``timeout_s`` is over.

    Raises:
        ValueError: As :func:`open_client`.
        FeatureStoreUnavailable: No answer in time; names the URL without its password.
    """
    deadline = time.monotonic() + timeout_s
    client = open_client(url, timeout_s)
    while True:
        try:
            client.ping()
            return client
        except redis.AuthenticationError as error:
            client.close()
            raise FeatureStoreUnavailable(f"Redis at {masked(url)} refused the credentials: {error}") from error
        except (redis.ConnectionError, redis.TimeoutError) as error:
            if time.monotonic() + _PAUSE_S >= deadline:
                client.close()
                raise FeatureStoreUnavailable(
                    f"Redis at {masked(url)} gave no answer within {timeout_s:g} s: {error}"
                ) from error
        time.sleep(_PAUSE_S)


def masked(url: str) -> str:
    """The URL with its password replaced by ``***``."""
    try:
        parts = urlsplit(url)
        if parts.password is None:
            return url
    except ValueError:  # no URL at all, so no password in a known place either
        return "(unreadable)"
    address = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:***@{address}"))


def address(client: redis.Redis) -> str:
    """Where a client connects to, without credentials."""
    settings = client.connection_pool.connection_kwargs
    if "path" in settings:
        return f"unix://{settings['path']}"
    return f"redis://{settings.get('host', 'localhost')}:{settings.get('port', 6379)}/{settings.get('db') or 0}"


@contextmanager
def translated(client: redis.Redis, doing: str) -> Iterator[None]:
    """Turn Redis' errors into ours; ``doing`` completes "Redis at … while …".

    Raises:
        FeatureStoreUnavailable: No connection, or no answer in time.
        FeatureStoreError: Redis answered with an error, such as its memory being full.
    """
    try:
        yield
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise FeatureStoreUnavailable(f"Redis at {address(client)} gave no answer while {doing}: {error}") from error
    except redis.OutOfMemoryError as error:
        raise FeatureStoreError(
            f"Redis at {address(client)} has no memory left while {doing}: raise its maxmemory or keep less "
            f"(retain_bytes): {error}"
        ) from error
    except redis.RedisError as error:
        raise FeatureStoreError(f"Redis at {address(client)} refused while {doing}: {error}") from error


_T = TypeVar("_T")

LONGEST_BLOCK_S = 1.0
"""A blocking command asks again this often, well within every client's socket timeout."""

_BACKOFF_S = (0.02, 0.05, 0.1, 0.2, 0.5)


def connect_log(url: str, *, timeout_s: float) -> redis.Redis:
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
