"""Connections to Redis with every wait bounded, and its errors in the project's terms.

How a server lets us in is the business of :mod:`smes_io.redis_access`.

Some of Redis' error answers say "not here" or "not now": a primary that became a replica, a server that loads its data
or is busy with a script. These are treated as a lost connection. The client's connections are dropped, so that the next
try resolves the address again and finds the server that is the primary now.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, AuthorizationError, NoPermissionError
from redis.retry import Retry

from smes.errors import EventLogError, EventLogUnavailable, FeatureStoreError, FeatureStoreUnavailable, SmesError
from smes_io.redis_access import AccessRefused, RedisAccess, SlotRoute, Unfit, options, user_of
from smes_io.secrets import masked_text
from smes_io.stopping import StoppableCalls
from smes_io.tls import refusal

_T = TypeVar("_T")
_OUTAGE = (redis.ConnectionError, redis.TimeoutError)
_DENIED = (AuthenticationError, AuthorizationError)  # to redis, kinds of ConnectionError

_NOT_NOW = frozenset(
    {
        "BUSY",  # a script or function runs for longer than busy-reply-threshold
        "CLUSTERDOWN",  # the cluster has no primary for the key at the moment
        "LOADING",  # the server reads its file
        "MASTERDOWN",  # a replica without a link to its primary that must not serve old data
        "MISCONF",  # the server's disk refuses its file, as when it is full; it goes on when there is room
        "MOVED",  # another server of the cluster has the key; so an address that names that one again may help
        "ASK",
        "NOREPLICAS",  # fewer replicas than min-replicas-to-write
        "READONLY",  # a primary that became a replica
        "REDIRECT",  # the same, as Valkey says it during a failover
        "TRYAGAIN",  # the cluster moves the key
        "UNBLOCKED",  # a blocking command was ended because the primary became a replica
    }
)
"""First words of the answers of a server that will, or another server that does, serve the same command later."""

_IN_PIPELINE = "of pipeline caused error: "  # the client puts this, and the command, before an answer in a pipeline
_NO_RIGHT_IN_SCRIPT = ("ACL failure in script", "The user executing the script can't")  # the latter before Redis 7.2


class NotNow(redis.ConnectionError):
    """Redis answered "not here" or "not now": to be treated as a lost connection."""


@dataclass(frozen=True)
class RedisErrors:
    """What Redis' errors become for one of its users.

    Attributes:
        unavailable: No connection, or no answer in time.
        denied: The credentials, or the certificates of one of the two sides, are wrong.
        refused: Redis answered with an error, such as its memory being full.
        size_key: The configuration key that makes its user keep less.
    """

    unavailable: type[SmesError]
    denied: type[SmesError]
    refused: type[SmesError]
    size_key: str


EVENT_LOG = RedisErrors(EventLogUnavailable, EventLogError, EventLogError, "max_entries_per_partition")
FEATURE_STORE = RedisErrors(FeatureStoreUnavailable, FeatureStoreUnavailable, FeatureStoreError, "retain_bytes")


def open_client(
    url: str,
    timeout_s: float,
    *,
    answer_timeout_s: float | None = None,
    access: RedisAccess | None = None,
    namespace: str = "",
) -> redis.Redis:
    """A client that connects on first use; safe to share between threads.

    Args:
        url: ``redis://[user[:password]@]host:port[/db]``, ``rediss://…`` or ``unix://path``.
        timeout_s: Longest wait for a connection and for an answer, each.
        answer_timeout_s: Longest wait for an answer where it differs, as for blocking commands.
        access: How the server lets us in, beside what the URL says.
        namespace: Whose keys the client is for; a cluster needs to know.

    Raises:
        ValueError: The URL has another form or does not fit ``access``, or the timeout is not positive.
    """
    if not timeout_s > 0:
        raise ValueError(f"Redis timeout {timeout_s} s, expected more than 0")
    try:
        pool = redis.ConnectionPool(
            **{
                "socket_connect_timeout": timeout_s,
                "socket_timeout": timeout_s if answer_timeout_s is None else answer_timeout_s,
                # One retry, because the server may have closed an idle connection; never one after a timeout, which
                # would double the wait.
                "retry": Retry(NoBackoff(), 1, (redis.ConnectionError,)),
                **options(url, access or RedisAccess(), namespace),
            }
        )
        return redis.Redis.from_pool(pool)
    except ValueError as error:
        # The client's own message may quote a part of the password.
        why = "" if "@" in url and not isinstance(error, Unfit) else f" ({error})"
        wanted = "redis://[user[:password]@]host:port[/database], special characters of the password as %XX"
        raise ValueError(f"Redis URL {masked(url)!r}{why}, expected {wanted}") from None


def connect(
    url: str,
    timeout_s: float,
    errors: RedisErrors = FEATURE_STORE,
    *,
    answer_timeout_s: float | None = None,
    access: RedisAccess | None = None,
    namespace: str = "",
) -> redis.Redis:
    """A client whose server has answered.

    A server that is starting (refusing connections, loading its data) is asked again until ``timeout_s`` is over.

    Args:
        url, timeout_s, answer_timeout_s, access, namespace: As :func:`open_client`.
        errors: Of the client's user.

    Raises:
        ValueError: As :func:`open_client`.
        SmesError: ``errors.unavailable``: no answer in time. ``errors.denied``: wrong credentials or certificates.
    """
    client = open_client(url, timeout_s, answer_timeout_s=answer_timeout_s, access=access, namespace=namespace)
    try:
        retry_during_outage(client, "connecting", client.ping, errors, timeout_s)
    except BaseException:
        client.close()
        raise
    return client


def retry_during_outage(
    client: redis.Redis,
    doing: str,
    call: Callable[[], _T],
    errors: RedisErrors,
    timeout_s: float,
    calls: StoppableCalls | None = None,
) -> _T:
    """Call until the server answers, for up to ``timeout_s``; errors as :func:`translated`.

    Every answer of the kind "not here" or "not now" is tried again too, on a new connection.

    Args:
        client, doing, errors: As :func:`translated`.
        call: What to try. If it collects error answers itself, it raises :func:`not_now`'s.
        timeout_s: How long to try.
        calls: Hears a stop; None: nothing does.

    Raises:
        Stopped: A try failed, and a stop was asked for.
    """

    def attempt() -> _T:
        try:
            return call()
        except redis.RedisError as error:
            if (later := not_now(error)) is not None:
                drop_connections(client)
                raise later from error
            if not isinstance(error, AccessRefused) and (why := refusal(error)):
                raise AccessRefused(why) from error  # of a client's certificate one hears after the handshake
            raise

    what = f"Redis at {address(client)}: {doing}"
    with translated(client, doing, errors, tried_s=timeout_s):
        tries = calls or StoppableCalls()
        return tries.retry(what, attempt, timeout_s=timeout_s, retriable=_OUTAGE, fatal=_DENIED)


def not_now(error: Exception) -> NotNow | None:
    """The error as :class:`NotNow` if it is an answer of the kind "not here" or "not now", else None."""
    if isinstance(error, NotNow):
        return error
    if not isinstance(error, redis.ResponseError | redis.exceptions.BusyLoadingError):
        return None
    text = str(error).rpartition(_IN_PIPELINE)[2]
    code = error.status_code or text.partition(" ")[0]
    if code not in _NOT_NOW:
        return None
    return NotNow(text if text.startswith(code) else f"{code} {text}")


def drop_connections(client: redis.Redis) -> None:
    """Close the connections that nobody uses at the moment; the next command resolves the address again."""
    route = client.connection_pool.connection_kwargs.get("route")
    if isinstance(route, SlotRoute):
        route.doubt()
    client.connection_pool.disconnect(inuse_connections=False)


@contextmanager
def translated(
    client: redis.Redis, doing: str, errors: RedisErrors = FEATURE_STORE, *, tried_s: float | None = None
) -> Iterator[None]:
    """Turn Redis' errors into ours; the message names the server without its password.

    After an answer of the kind "not here" or "not now" the client's connections are dropped, so that a later call may
    find the server that is the primary by then.

    Args:
        client: Whose server to name.
        doing: Completes "Redis at … gave no answer while …".
        errors: Of the client's user.
        tried_s: How long the call was tried, where it was tried again.

    Raises:
        SmesError: See :class:`RedisErrors`.
    """
    where = f"Redis at {address(client)}"
    within = "" if tried_s is None else f" within {tried_s:g} s"
    try:
        yield
    except AccessRefused as error:
        raise errors.denied(f"{where} cannot be used while {doing}: {error}") from error
    except _DENIED as error:
        raise errors.denied(f"{where} refused the credentials while {doing}: {error}") from error
    except redis.RedisError as error:
        if (later := not_now(error)) is not None:
            drop_connections(client)
            raise errors.unavailable(f"{where} could not serve{within} while {doing}: {later}") from error
        if why := refusal(error):
            raise errors.denied(f"{where} cannot be used while {doing}: {why}") from error
        if isinstance(error, _OUTAGE):
            raise errors.unavailable(f"{where} gave no answer{within} while {doing}: {error}") from error
        if isinstance(error, redis.OutOfMemoryError):
            more = f"raise its maxmemory or keep less ({errors.size_key})"
            raise errors.refused(f"{where} has no memory left while {doing}: {more}: {error}") from error
        if isinstance(error, NoPermissionError) or any(words in str(error) for words in _NO_RIGHT_IN_SCRIPT):
            user = user_of(client.connection_pool.connection_kwargs) or "default"
            raise errors.refused(f"{where}: user {user!r} lacks a right while {doing}: {error}") from error
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
    secret = settings.get("password") or settings.get("credential_provider")
    user = user_of(settings) + (":***" if secret else "")
    place = f"{settings.get('host', 'localhost')}:{settings.get('port', 6379)}/{settings.get('db') or 0}"
    return f"{scheme}://{user}{'@' if user else ''}{place}"
