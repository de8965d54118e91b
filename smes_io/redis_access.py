"""How a Redis lets its clients in: TLS, an ACL user, and which server of a cluster has a namespace's keys.

All keys of a namespace have the same hash tag, so one server of a Redis Cluster has all of them. A connection asks the
cluster which one that is, and goes there. When the keys move, the server answers MOVED or READONLY; that is treated as
a lost connection (:mod:`smes_io.redis_client`), and the next connection asks again.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from socket import socket
from typing import Any, cast
from urllib.parse import urlsplit

import redis
from redis.connection import parse_url
from redis.crc import key_slot
from redis.credentials import CredentialProvider

from smes_io.secrets import SecretError, SecretPlace
from smes_io.tls import TlsFiles, refusal

Node = tuple[str, int]
"""Host and port."""


@dataclass(frozen=True)
class RedisAccess:
    """How Redis lets us in. The URL says whether by TLS: ``rediss://``.

    Attributes:
        user: The ACL user. Null: the one in the URL, else ``default``.
        password: Where the user's password is: ``{file: …}`` or ``{env: …}``. Null: the one in the URL, if any.
        tls: Certificates, for ``rediss://``.
        cluster: Whether the URL names a server of a Redis Cluster. Its other servers are found through it.
    """

    user: str | None = None
    password: SecretPlace | None = None
    tls: TlsFiles = field(default_factory=TlsFiles)
    cluster: bool = False

    def __post_init__(self) -> None:
        if self.user is not None and self.password is None:
            raise ValueError(f"RedisAccess.password: missing for user {self.user!r}, expected file or env")


class AccessRefused(redis.AuthenticationError):
    """The server, or what we have to show to it, is not as it should be; to try again would not help."""


class Unfit(ValueError):
    """A URL and what stands beside it do not fit together. The message holds no password."""


def key_prefix(namespace: str) -> str:
    """What the keys of a namespace begin with: a hash tag, so that one server of a cluster has all of them.

    Raises:
        ValueError: The namespace has braces, so that it could not be a hash tag, or is empty.
    """
    if not namespace or "{" in namespace or "}" in namespace:
        raise ValueError(f"namespace {namespace!r}: expected at least one character, and no braces")
    return f"{{{namespace}}}"


def options(url: str, access: RedisAccess, namespace: str) -> dict[str, Any]:
    """Arguments of a :class:`redis.ConnectionPool`, from a URL and what stands beside it.

    Args:
        url: Of the server.
        access: How it lets us in.
        namespace: Whose keys are wanted; needed for a cluster only.

    Raises:
        Unfit: The URL does not fit what stands beside it.
        ValueError: The URL is malformed; the message may quote a password.
    """
    found: dict[str, Any] = parse_url(url)  # type: ignore[no-untyped-call]  # of redis
    scheme = urlsplit(url).scheme
    more: dict[str, Any] = {"connection_class": _KINDS[scheme]}
    if scheme != "rediss" and access.tls != TlsFiles():
        raise Unfit(f"certificates for a {scheme}:// URL, expected rediss://")
    if scheme == "rediss":
        if unknown := next((name for name in found if name.startswith("ssl_")), None):
            raise Unfit(f"{unknown} in the URL, expected certificates beside it, under tls")
        more["tls"] = access.tls
    if access.password is not None:
        if found.get("password"):
            raise Unfit("a password in the URL and another one beside it, expected one of them")
        user = access.user or found.get("username")
        if user is not None and found.get("username") not in (None, user):
            raise Unfit(f"user {found['username']!r} in the URL and {user!r} beside it, expected one of them")
        more |= {"username": None, "password": None, "credential_provider": _Credentials(user, access.password)}
    if access.cluster:
        if scheme == "unix":
            raise Unfit("a cluster behind a unix:// URL, expected redis:// or rediss://")
        if found.get("db"):
            raise Unfit(f"database {found['db']} of a cluster, expected 0, the only one that a cluster has")
        seed = (found.get("host", "localhost"), found.get("port", 6379))
        more["route"] = SlotRoute(seed, key_slot(key_prefix(namespace).encode()))
    return found | more


def user_of(settings: Mapping[str, Any]) -> str:
    """The ACL user of a client with these arguments of its pool; empty if the server is to take us for its default."""
    credentials = settings.get("credential_provider")
    return (credentials.user if isinstance(credentials, _Credentials) else settings.get("username")) or ""


class SlotRoute:
    """Finds the server of a cluster that has one slot; shared by the connections of a client, thread-safe.

    Args:
        seed: A server of the cluster. The others are learned from it.
        slot: Number of the slot.
    """

    def __init__(self, seed: Node, slot: int) -> None:
        self.slot = slot
        self._lock = threading.Lock()
        self._nodes: list[Node] = [seed]  # the next one to ask comes first

    def owner(self, ask: Callable[[Node], Sequence[Any]]) -> Node:
        """The server that has the slot, as the first one says that answers.

        Args:
            ask: Gives a server's answer to CLUSTER SLOTS.

        Raises:
            redis.RedisError: None of them answers, or the slot has no server.
        """
        with self._lock:
            nodes = list(self._nodes)
        failure: redis.ConnectionError | None = None
        for node in nodes:
            try:
                ranges = ask(node)
            except (redis.AuthenticationError, redis.ResponseError):
                raise  # an answer, and every server of the cluster would give it
            except (redis.ConnectionError, redis.TimeoutError) as error:
                self.doubt(node)
                failure = failure or redis.ConnectionError(str(error))
                continue
            return self._found(node, ranges)
        assert failure is not None, "there is a seed"
        raise failure

    def doubt(self, node: Node | None = None) -> None:
        """Ask this server last from now on, by default the one that was asked last: it does not know the way."""
        with self._lock:
            node = self._nodes[0] if node is None else node
            if node in self._nodes:
                self._nodes.remove(node)
                self._nodes.append(node)

    def _found(self, asked: Node, ranges: Sequence[Any]) -> Node:
        owner: Node | None = None
        known: list[Node] = []
        for first, last, *servers in ranges:
            nodes = [_node(server, asked) for server in servers]
            known += nodes
            if first <= self.slot <= last:
                owner = nodes[0]
        with self._lock:
            self._nodes += [node for node in dict.fromkeys(known) if node not in self._nodes]
        if owner is None:
            raise redis.ConnectionError(f"CLUSTERDOWN no server of the cluster has slot {self.slot}")
        return owner


class _Credentials(CredentialProvider):
    """Reads the password for every connection, so that it may change."""

    def __init__(self, user: str | None, password: SecretPlace) -> None:
        self.user, self._password = user, password

    def __repr__(self) -> str:
        return f"user {self.user or 'default'}, password from {self._password}"

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        try:
            password = self._password.read()
        except SecretError as error:
            raise AccessRefused(f"password: {error}") from error
        return (password,) if self.user is None else (self.user, password)


class _Routed(redis.Connection):
    """A connection to the server of a cluster that has a slot; to the one of the URL without a route."""

    def __init__(self, route: SlotRoute | None = None, **more: Any) -> None:
        super().__init__(**more)  # type: ignore[no-untyped-call]  # of redis
        self._route, self._more = route, more

    def _connect(self) -> socket:
        if self._route is not None:
            self.host, self.port = self._route.owner(self._slots)
        return cast(socket, super()._connect())  # type: ignore[no-untyped-call]  # of redis

    def _slots(self, node: Node) -> Sequence[Any]:
        one: Any = type(self)(**self._more | {"host": node[0], "port": node[1]})
        try:
            one.connect()
            one.send_command("CLUSTER", "SLOTS")
            return cast(Sequence[Any], one.read_response())
        finally:
            one.disconnect()


class _RoutedTls(_Routed, redis.SSLConnection):
    """The same by TLS."""

    def __init__(self, tls: TlsFiles, **more: Any) -> None:
        super().__init__(**more)
        self._tls, self._more = tls, {**self._more, "tls": tls}

    def _wrap_socket_with_ssl(self, sock: socket) -> socket:
        """The client's own trusts the system's certificates besides those given, and does not name a missing file."""
        try:
            return self._tls.context().wrap_socket(sock, server_hostname=self.host)
        except SecretError as error:
            raise AccessRefused(str(error)) from error
        except OSError as error:
            if why := refusal(error):
                raise AccessRefused(why) from error
            raise


_KINDS: dict[str, Any] = {
    "redis": _Routed,
    "rediss": _RoutedTls,
    "unix": redis.UnixDomainSocketConnection,
}


def _node(server: Sequence[Any], asked: Node) -> Node:
    """Host and port of a server in an answer to CLUSTER SLOTS; without a host, it is on that of the one asked."""
    host, port = server[0], server[1]
    name = host.decode() if isinstance(host, bytes) else host
    return (asked[0] if name in (None, "", "?") else str(name)), int(port)
