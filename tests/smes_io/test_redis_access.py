"""Redis with TLS and ACL users, and Redis Clusters: real servers; errors name what and where, and no secrets."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from smes.errors import EventLogError, FeatureStoreError, FeatureStoreUnavailable
from smes_io.redis_access import AccessRefused, RedisAccess, SlotRoute, key_prefix
from smes_io.redis_client import (
    EVENT_LOG,
    FEATURE_STORE,
    address,
    connect,
    open_client,
    retry_during_outage,
    translated,
)
from smes_io.secrets import SecretPlace
from smes_io.tls import TlsFiles
from tests.certificates import Authority
from tests.secure_servers import RedisCluster, SecureRedis

SECRET = "us3r-s3cret"
HANG_S = 30.0


@pytest.fixture
def password(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text(SECRET + "\n")
    return path


@pytest.fixture
def let_in(redis_secure: SecureRedis, namespace: str, password: Path) -> Callable[..., RedisAccess]:
    """How the user ``smes`` of the namespace gets in; arguments change that."""
    rights = (f"~{key_prefix(namespace)}:*", "+@read", "+@write", "+@connection", "+acl|whoami", "+eval")
    redis_secure.set_user("smes", "on", f">{SECRET}", *rights)

    def let_in(**changes: Any) -> RedisAccess:
        authority, client = redis_secure.authority, redis_secure.client
        tls: dict[str, Any] = {"ca_file": authority.cert, "cert_file": client.cert, "key_file": client.key}
        tls |= {name: changes.pop(name) for name in tls if name in changes}
        user: dict[str, Any] = {"user": "smes", "password": SecretPlace(file=password)}
        return RedisAccess(tls=TlsFiles(**tls), **(user | changes))

    return let_in


def test_a_user_gets_in_by_tls(redis_secure: SecureRedis, namespace: str, let_in: Callable[..., RedisAccess]) -> None:
    with connect(redis_secure.url, 10.0, access=let_in()) as client:
        key = f"{key_prefix(namespace)}:a"
        client.set(key, "b")

        assert client.get(key) == b"b"
        assert client.acl_whoami() == "smes"
        assert address(client) == f"rediss://smes:***@127.0.0.1:{redis_secure.port}/0"
        assert SECRET not in repr(client) + repr(client.connection_pool)


def test_a_user_may_stand_in_the_url(redis_secure: SecureRedis, let_in: Callable[..., RedisAccess]) -> None:
    url = redis_secure.url.replace("//", "//smes@")
    with connect(url, 10.0, access=let_in(user=None)) as client:
        assert client.acl_whoami() == "smes"


def test_a_new_password_is_read_for_the_next_connection(
    redis_secure: SecureRedis, let_in: Callable[..., RedisAccess], password: Path
) -> None:
    with connect(redis_secure.url, 10.0, access=let_in()) as client:
        redis_secure.owner.execute_command("ACL", "SETUSER", "smes", "resetpass", ">another")
        password.write_text("another")
        client.connection_pool.disconnect()

        assert client.ping()


WRONG: dict[str, tuple[Callable[[SecureRedis, Path], dict[str, Any]], str]] = {
    "password": (
        lambda server, folder: {"password": SecretPlace(file=written(folder / "wrong", "wr0ng"))},
        "refused the credentials while connecting: invalid username-password pair or user is disabled",
    ),
    "user": (lambda server, folder: {"user": "nobody"}, "refused the credentials while connecting"),
    "no password file": (
        lambda server, folder: {"password": SecretPlace(file=folder / "none")},
        r"cannot be used while connecting: password: file .*none: cannot be read: No such file",
    ),
    "authority": (
        lambda server, folder: {"ca_file": Authority(folder, "stranger").cert},
        r"cannot be used while connecting: the server's certificate is not to be trusted \(ca_file, check_hostname\)",
    ),
    "authority of the system": (
        lambda server, folder: {"ca_file": None},
        "cannot be used while connecting: the server's",
    ),
    "no certificate": (
        lambda server, folder: {"cert_file": None, "key_file": None},
        r"cannot be used while connecting: the server wants a client's certificate \(cert_file, key_file\)",
    ),
    "certificate": (
        lambda server, folder: of_a_stranger(folder),
        r"cannot be used while connecting: the server does not accept the client's certificate \(cert_file, key_file\)",
    ),
    "no such certificate": (
        lambda server, folder: {"cert_file": folder / "none"},
        "cannot be used while connecting: cert_file .*none: cannot be read: No such file",
    ),
}


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def of_a_stranger(folder: Path) -> dict[str, Path]:
    pair = Authority(folder, "stranger").signed("client")
    return {"cert_file": pair.cert, "key_file": pair.key}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_named_at_once(
    redis_secure: SecureRedis, let_in: Callable[..., RedisAccess], tmp_path: Path, wrong: str
) -> None:
    changes, message = WRONG[wrong]
    access = let_in(**changes(redis_secure, tmp_path))

    said = []
    for errors in (EVENT_LOG, FEATURE_STORE):
        with pytest.raises(errors.denied, match=rf"Redis at rediss://.*:{redis_secure.port}/0 {message}") as error:
            connect(redis_secure.url, 2 * HANG_S, errors, access=access)
        said.append(str(error.value))

    assert not any(secret in text for text in said for secret in (SECRET, "wr0ng", "PRIVATE"))


def test_the_certificate_must_be_for_the_host(redis_secure: SecureRedis, let_in: Callable[..., RedisAccess]) -> None:
    url = redis_secure.url.replace("127.0.0.1", "localhost")

    with pytest.raises(FeatureStoreUnavailable, match="not valid for 'localhost'"):
        connect(url, 2 * HANG_S, access=let_in())


def test_a_server_without_tls_is_named(redis_url: str) -> None:
    with pytest.raises(EventLogError, match=r"the server does not speak TLS on this port|gave no answer"):
        connect(redis_url.replace("redis://", "rediss://"), 1.0, EVENT_LOG, access=RedisAccess())


@pytest.mark.parametrize(
    ("doing", "call", "answer"),
    [
        ("a key was read", lambda client: client.get("another"), "access a key|access one of the keys"),
        ("a script ran", lambda client: client.evalsha("0" * 40, 0), "run the 'evalsha' command"),
        (
            "another key was named in a script",
            lambda client: client.eval("redis.call('GET', 'x')", 0),
            "in script|the script",
        ),
        ("a pipeline ran", lambda client: in_a_pipeline(client), "access a key|access one of the keys"),
        ("somebody was told", lambda client: client.publish("there", "x"), "run the 'publish' command|channel"),
    ],
)
def test_a_missing_right_is_named_with_the_user(
    redis_secure: SecureRedis,
    let_in: Callable[..., RedisAccess],
    doing: str,
    call: Callable[[redis.Redis], object],
    answer: str,
) -> None:
    message = (
        rf"Redis at rediss://smes:\*\*\*@127.0.0.1:{redis_secure.port}/0: user 'smes' lacks a right while {doing}: "
    )
    with connect(redis_secure.url, 10.0, access=let_in()) as client:
        with pytest.raises(FeatureStoreError, match=f"{message}.*({answer})") as error, translated(client, doing):
            call(client)
        with pytest.raises(EventLogError, match=message):
            retry_during_outage(client, doing, lambda: call(client), EVENT_LOG, HANG_S)

    assert not isinstance(error.value, FeatureStoreUnavailable)


def in_a_pipeline(client: redis.Redis) -> object:
    pipe = client.pipeline(transaction=False)
    pipe.set("another", "value")
    return pipe.execute()


@pytest.mark.parametrize(
    ("url", "access", "message"),
    [
        ("redis://h", {"tls": TlsFiles(check_hostname=False)}, "certificates for a redis:// URL, expected rediss://"),
        ("rediss://h?ssl_cert_reqs=none", {}, "ssl_cert_reqs in the URL, expected certificates beside it"),
        ("redis://a:p@h", {"password": SecretPlace(env="X")}, "a password in the URL and another one beside it"),
        ("redis://a@h", {"user": "b", "password": SecretPlace(env="X")}, "user 'a' in the URL and 'b' beside it"),
        ("unix://run/redis", {"cluster": True}, "a cluster behind a unix:// URL"),
        ("redis://h/3", {"cluster": True}, "database 3 of a cluster, expected 0"),
    ],
)
def test_a_url_and_what_stands_beside_it_must_fit(url: str, access: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="Redis URL") as error:
        open_client(url, 1.0, access=RedisAccess(**access), namespace="smes")
    assert message in str(error.value)
    assert ":p@" not in str(error.value)


def test_a_user_needs_a_password() -> None:
    with pytest.raises(ValueError, match=r"RedisAccess\.password: missing for user 'a', expected file or env"):
        RedisAccess(user="a")


@pytest.mark.parametrize("namespace", ["", "a{b", "a}b"])
def test_a_namespace_can_be_a_hash_tag(namespace: str) -> None:
    with pytest.raises(ValueError, match="expected at least one character, and no braces"):
        key_prefix(namespace)


def test_a_client_of_a_cluster_is_at_the_namespaces_node(cluster: RedisCluster, namespace: str) -> None:
    owner = cluster.owner(key_prefix(namespace))
    for seed in range(3):
        with connect(cluster.url(seed), 10.0, access=RedisAccess(cluster=True), namespace=namespace) as client:
            client.set(f"{key_prefix(namespace)}:a", seed)
            assert client.client_info()["laddr"].endswith(f":{cluster.port(owner)}")
            assert client.get(f"{key_prefix(namespace)}:a") == b"%d" % seed


def test_after_a_move_the_next_try_finds_the_keys(cluster: RedisCluster, namespace: str) -> None:
    key = f"{key_prefix(namespace)}:a"
    with connect(cluster.url(), 10.0, access=RedisAccess(cluster=True), namespace=namespace) as client:
        client.set(key, "b")
        cluster.move(key, (cluster.owner(key) + 1) % 3)
        with (
            pytest.raises(FeatureStoreUnavailable, match="could not serve while reading: MOVED"),
            translated(client, "reading"),
        ):
            client.get(key)
        assert client.get(key) == b"b"

        cluster.move(key, (cluster.owner(key) + 1) % 3)
        assert retry_during_outage(client, "reading", lambda: client.get(key), EVENT_LOG, HANG_S) == b"b"


def test_without_cluster_mode_a_wrong_node_is_named(cluster: RedisCluster, namespace: str) -> None:
    key = f"{key_prefix(namespace)}:a"
    with (
        connect(cluster.url((cluster.owner(key) + 1) % 3), 10.0) as client,
        pytest.raises(FeatureStoreUnavailable, match="could not serve while reading: MOVED"),
        translated(client, "reading"),
    ):
        client.get(key)


def answers(*ranges: list[Any]) -> Callable[[tuple[str, int]], list[Any]]:
    return lambda node: list(ranges)


def test_a_route_asks_the_next_node_if_one_is_away() -> None:
    route, asked = SlotRoute(("seed", 1), 7), []
    whole = [[0, 9, [b"a", 2, b"id"], [b"b", 3, b"id"]], [10, 16383, [b"", 4, b"id"]]]
    assert route.owner(answers(*whole)) == ("a", 2)

    def ask(node: tuple[str, int]) -> list[Any]:
        asked.append(node)
        if node != ("b", 3):
            raise redis.ConnectionError(f"{node} is away")
        return [[0, 16383, [b"b", 3, b"id"]]]

    assert route.owner(ask) == ("b", 3)
    assert asked == [("seed", 1), ("a", 2), ("b", 3)]
    assert route.owner(ask) == ("b", 3)
    assert asked[3:] == [("b", 3)]  # the others, which were away, come last


def test_a_route_that_led_astray_is_asked_last() -> None:
    route, asked = SlotRoute(("seed", 1), 7), []
    route.owner(answers([0, 16383, ["a", 2, "id"]]))

    route.doubt()
    route.owner(lambda node: asked.append(node) or [[0, 16383, ["a", 2, "id"]]])  # type: ignore[func-returns-value]

    assert asked == [("a", 2)]


def test_a_slot_without_a_node_is_an_outage() -> None:
    with pytest.raises(redis.ConnectionError, match="CLUSTERDOWN no server of the cluster has slot 7"):
        SlotRoute(("seed", 1), 7).owner(answers([8, 16383, ["a", 2, "id"]]))


@pytest.mark.parametrize("error", [AccessRefused("x"), redis.AuthenticationError("x"), redis.ResponseError("x")])
def test_a_route_ends_at_a_refusal(error: Exception) -> None:
    asked = threading.Event()

    def ask(node: tuple[str, int]) -> list[Any]:
        assert not asked.is_set()
        asked.set()
        raise error

    with pytest.raises(type(error)):
        SlotRoute(("seed", 1), 7).owner(ask)
