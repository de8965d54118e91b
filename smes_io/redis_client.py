"""Connections to Redis with every wait bounded, and its errors in the project's terms."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, AuthorizationError
from redis.retry import Retry

from smes.errors import EventLogError, EventLogUnavailable, FeatureStoreError, FeatureStoreUnavailable, SmesError
from smes_io.clock import retry
from smes_io.secrets import masked_text

_T = TypeVar("_T")
_OUTAGE = (redis.ConnectionError, redis.TimeoutError)
_DENIED = (AuthenticationError, AuthorizationError)  # to redis, kinds of ConnectionError


@dataclass(frozen=True)
class RedisErrors:
    """What Redis' errors become for one of its users.

    Attributes:
        unavailable: No connection, or no answer in time.
        denied: The credentials are wrong.
        refused: Redis answered with an error, such as its memory being full.
        size_key: The configuration key that makes its user keep less.
    """

    unavailable: type[SmesError]
    denied: type[SmesError]
    refused: type[SmesError]
    size_key: str


EVENT_LOG = RedisErrors(EventLogUnavailable, EventLogError, EventLogError, "max_entries_per_partition")
FEATURE_STORE = RedisErrors(FeatureStoreUnavailable, FeatureStoreUnavailable, FeatureStoreError, "retain_bytes")


def open_client(url: str, timeout_s: float, *, answer_timeout_s: float | None = None) -> redis.Redis:
    """A client that connects on first use; safe to share between threads.

    Args:
        url: ``redis://[user[:password]@]host:port[/db]``, ``rediss://…`` or ``unix://path``.
        timeout_s: Longest wait for a connection and for an answer, each.
        answer_timeout_s: Longest wait for an answer where it differs, as for blocking commands.

    Raises:
        ValueError: The URL has another form, or the timeout is not positive.
    """
    if not timeout_s > 0:
        raise ValueError(f"Redis timeout {timeout_s} s, expected more than 0")
    try:
        return redis.Redis.from_url(
            url,
            socket_connect_timeout=timeout_s,
            socket_timeout=timeout_s if answer_timeout_s is None else answer_timeout_s,
            # One retry, because the server may have closed an idle connection; never one after a timeout, which
            # would double the wait.
            retry=Retry(NoBackoff(), 1, (redis.ConnectionError,)),
        )
    except ValueError as error:
        # The client's own message may quote a part of the password.
        why = "" if "@" in url else f" ({error})"
        wanted = "redis://[user[:password]@]host:port[/database], special characters of the password as %XX"
        raise ValueError(f"Redis URL {masked(url)!r}{why}, expected {wanted}") from error


def connect(
    url: str, timeout_s: float, errors: RedisErrors = FEATURE_STORE, *, answer_timeout_s: float | None = None
) -> redis.Redis:
    """A client whose server has answered.

    A server that is starting (refusing connections, loading its data) is asked again until ``timeout_s`` is over.

    Args:
        url, timeout_s, answer_timeout_s: As :func:`open_client`.
        errors: Of the client's user.

    Raises:
        ValueError: As :func:`open_client`.
        SmesError: ``errors.unavailable``: no answer in time. ``errors.denied``: wrong credentials.
    """
    client = open_client(url, timeout_s, answer_timeout_s=answer_timeout_s)
    try:
        retry_during_outage(client, "connecting", client.ping, errors, timeout_s)
    except BaseException:
        client.close()
        raise
    return client


def retry_during_outage(
    client: redis.Redis, doing: str, call: Callable[[], _T], errors: RedisErrors, timeout_s: float
) -> _T:
    """Call until the server answers, for up to ``timeout_s``; errors as :func:`translated`."""
    with translated(client, doing, errors, tried_s=timeout_s):
        return retry(call, timeout_s=timeout_s, retriable=_OUTAGE, fatal=_DENIED)


@contextmanager
def translated(
    client: redis.Redis, doing: str, errors: RedisErrors = FEATURE_STORE, *, tried_s: float | None = None
) -> Iterator[None]:
    """Turn Redis' errors into ours; the message names the server without its password.

    Args:
        client: Whose server to name.
        doing: Completes "Redis at … gave no answer while …".
        errors: Of the client's user.
        tried_s: How long the call was tried, where it was tried again.

    Raises:
        SmesError: See :class:`RedisErrors`.
    """
    where = f"Redis at {address(client)}"
    try:
        yield
    except _DENIED as error:
        raise errors.denied(f"{where} refused the credentials while {doing}: {error}") from error
    except _OUTAGE as error:
        within = "" if tried_s is None else f" within {tried_s:g} s"
        raise errors.unavailable(f"{where} gave no answer{within} while {doing}: {error}") from error
    except redis.OutOfMemoryError as error:
        raise errors.refused(
            f"{where} has no memory left while {doing}: raise its maxmemory or keep less ({errors.size_key}): {error}"
        ) from error
    except redis.RedisError as error:
        raise errors.refused(f"{where} refused while {doing}: {error}") from error


def masked(url: str) -> str:
    """The URL with its password replaced by ``***``, wherever it stands and whatever it holds."""
    return masked_text(url) if "://" in url else "(unreadable)"


def address(client: redis.Redis) -> str:
    """The URL that a client connects to, with ``***`` for its password."""
    pool = client.connection_pool
    settings = pool.connection_kwargs
    if "path" in settings:
        return f"unix://{settings['path']}"
    scheme = "rediss" if issubclass(pool.connection_class, redis.SSLConnection) else "redis"
    user = (settings.get("username") or "") + (":***" if settings.get("password") else "")
    place = f"{settings.get('host', 'localhost')}:{settings.get('port', 6379)}/{settings.get('db') or 0}"
    return f"{scheme}://{user}{'@' if user else ''}{place}"
