"""Kafka that does not let everybody in: TLS, SASL and ACLs of a real node. Errors name what and where, no secrets."""

import logging
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from kafka.admin import ACLOperation

from smes.errors import EventLogError, EventLogUnavailable
from smes_io.secrets import SecretError, SecretPlace
from smes_io.tls import TlsFiles
from stream.log.event_log import OutRecord, TopicPartition
from stream.log.kafka_config import KafkaAccess, KafkaLogConfig
from stream.log.kafka_log import KafkaLog
from tests.certificates import Authority
from tests.secure_servers import SecureKafka, secure_kafka

pytestmark = [pytest.mark.kafka, pytest.mark.xdist_group("kafka_secure")]

SECRET = "scr4m-s3cret"
AT = TopicPartition("t", 0)
LONG_S = 60.0  # of a wait that must not be waited for
RECORD = OutRecord(b"x", (("codec", b"json"),), 0)


@pytest.fixture
def user(kafka_secure: SecureKafka) -> str:
    """A user of SCRAM of the test's own, without rights."""
    name = f"user-{uuid.uuid4().hex[:8]}"
    kafka_secure.add_user(name, SECRET)
    return name


@pytest.fixture
def let_in(kafka_secure: SecureKafka, user: str, tmp_path: Path) -> Callable[..., KafkaAccess]:
    """How the user gets in; arguments change that."""

    def let_in(**changes: Any) -> KafkaAccess:
        path = tmp_path / "password"
        path.write_text(changes.pop("secret", SECRET) + "\n")
        given: dict[str, Any] = {"user": user, "password": SecretPlace(file=path)}
        given |= {"protocol": "SASL_SSL", "tls": TlsFiles(ca_file=kafka_secure.authority.cert)}
        return KafkaAccess(**(given | changes))

    return let_in


@pytest.fixture
def open_log(namespace: str) -> Iterator[Callable[..., KafkaLog]]:
    with ExitStack() as stack:

        def open_log(bootstrap: str, access: KafkaAccess, outage_s: float = 5.0, connect_s: float = LONG_S) -> KafkaLog:
            config = KafkaLogConfig(outage_timeout_s=outage_s)
            log = KafkaLog(bootstrap, namespace, config, access=access, connect_timeout_s=connect_s)
            stack.callback(log.close)
            return log

        yield open_log


ALL = (ACLOperation.CREATE, ACLOperation.DESCRIBE, ACLOperation.READ, ACLOperation.WRITE)


def used(log: KafkaLog) -> list[bytes]:
    """What the log holds after one more record: every kind of client is made and used."""
    log.ensure_topic("t", 1)
    log.append("t", [RECORD])
    values: list[bytes] = []
    positions = log.begin("t")
    while positions != log.end("t"):
        fetch = log.read(positions, max_records=10, timeout_s=5.0)
        values += [record.value for record in fetch.records]
        positions = fetch.positions
    return values


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-256", "SCRAM-SHA-512"])
def test_a_user_of_scram_by_tls(
    kafka_secure: SecureKafka,
    user: str,
    let_in: Callable[..., KafkaAccess],
    open_log: Callable[..., KafkaLog],
    namespace: str,
    mechanism: str,
) -> None:
    kafka_secure.allow(f"User:{user}", ALL, f"{namespace}.")

    assert used(open_log(kafka_secure.sasl_ssl, let_in(mechanism=mechanism))) == [b"x"]


@pytest.mark.parametrize("protocol", ["SASL_SSL", "SASL_PLAINTEXT"])
def test_a_user_of_plain(
    kafka_secure: SecureKafka,
    let_in: Callable[..., KafkaAccess],
    open_log: Callable[..., KafkaLog],
    namespace: str,
    protocol: str,
) -> None:
    kafka_secure.allow("User:plain", ALL, f"{namespace}.")
    access = let_in(user="plain", secret="pl41n", mechanism="PLAIN")
    where = kafka_secure.sasl_ssl
    if protocol == "SASL_PLAINTEXT":
        access = let_in(user="plain", secret="pl41n", mechanism="PLAIN", protocol=protocol, tls=TlsFiles())
        where = kafka_secure.sasl_plaintext

    assert used(open_log(where, access)) == [b"x"]


def test_a_client_with_a_certificate(
    kafka_secure: SecureKafka, open_log: Callable[..., KafkaLog], namespace: str
) -> None:
    kafka_secure.allow("User:CN=client", ALL, f"{namespace}.")
    client = kafka_secure.client
    access = KafkaAccess("SSL", tls=TlsFiles(kafka_secure.authority.cert, client.cert, client.key))

    assert used(open_log(kafka_secure.ssl, access)) == [b"x"]


def test_a_new_password_is_read_for_the_next_client(
    kafka_secure: SecureKafka,
    user: str,
    let_in: Callable[..., KafkaAccess],
    open_log: Callable[..., KafkaLog],
    namespace: str,
) -> None:
    kafka_secure.allow(f"User:{user}", ALL, f"{namespace}.")
    log = open_log(kafka_secure.sasl_ssl, let_in())
    log.ensure_topic("t", 1)
    kafka_secure.add_user(user, "another")
    let_in(secret="another")  # writes the file

    log.append("t", [RECORD])  # a producer is made

    assert log.end("t") == {AT: 1}


@pytest.mark.timeout(300)
def test_after_an_outage_the_clients_log_in_again(
    kafka_home: Path, openssl: None, tmp_path: Path, open_log: Callable[..., KafkaLog], namespace: str
) -> None:
    password = tmp_path / "password"
    password.write_text("pl41n")
    with secure_kafka(kafka_home, tmp_path / "kafka", {"plain": "pl41n"}) as kafka:
        kafka.allow("User:plain", ALL, f"{namespace}.")
        tls = TlsFiles(ca_file=kafka.authority.cert)
        access = KafkaAccess("SASL_SSL", "PLAIN", "plain", SecretPlace(file=password), tls)
        log = open_log(kafka.sasl_ssl, access, 120.0)
        assert used(log) == [b"x"]
        kafka.server.stop()

        appending = threading.Thread(target=log.append, args=("t", [RECORD]))
        appending.start()
        with kafka.start():
            appending.join(120)
            assert not appending.is_alive()
            assert used(log) == [b"x"] * 3
            log.close()


REFUSALS: dict[str, tuple[Callable[[SecureKafka, Path], dict[str, Any]], str]] = {
    "password": (
        lambda kafka, folder: {"secret": "wr0ng"},
        r"refused the credentials of user 'user-.*' \(SCRAM-SHA-512\)",
    ),
    "user": (lambda kafka, folder: {"user": "nobody"}, r"refused the credentials of user 'nobody' \(SCRAM-SHA-512\)"),
    "password of plain": (
        lambda kafka, folder: {"user": "plain", "secret": "wr0ng", "mechanism": "PLAIN"},
        r"refused the credentials of user 'plain' \(PLAIN\): Authentication failed: Invalid username or password",
    ),
    "authority": (
        lambda kafka, folder: {"tls": TlsFiles(ca_file=Authority(folder, "stranger").cert)},
        r"cannot be used: the server's certificate is not to be trusted \(ca_file, check_hostname\)",
    ),
    "authority of the system": (
        lambda kafka, folder: {"tls": TlsFiles()},
        r"cannot be used: the server's certificate is not to be trusted",
    ),
}


@pytest.mark.parametrize("wrong", REFUSALS)
def test_what_is_refused_is_named_at_once(
    kafka_secure: SecureKafka,
    let_in: Callable[..., KafkaAccess],
    open_log: Callable[..., KafkaLog],
    tmp_path: Path,
    wrong: str,
) -> None:
    changes, message = REFUSALS[wrong]
    where = kafka_secure.sasl_ssl

    with pytest.raises(EventLogError, match=f"Kafka at {where}: connect: {where} {message}") as error:
        open_log(where, let_in(**changes(kafka_secure, tmp_path)))
    assert not isinstance(error.value, EventLogUnavailable)
    assert not any(secret in str(error.value) for secret in (SECRET, "wr0ng", "pl41n"))


@pytest.mark.parametrize("stranger", [False, True], ids=["no certificate", "of a stranger"])
def test_a_certificate_is_asked_for(
    kafka_secure: SecureKafka, open_log: Callable[..., KafkaLog], tmp_path: Path, stranger: bool
) -> None:
    pair = Authority(tmp_path, "stranger").signed("client") if stranger else None
    tls = TlsFiles(kafka_secure.authority.cert, pair.cert if pair else None, pair.key if pair else None)

    with pytest.raises(EventLogError, match=r"connect: .* (accept the|wants a) client's certificate") as error:
        open_log(kafka_secure.ssl, KafkaAccess("SSL", tls=tls))
    assert not isinstance(error.value, EventLogUnavailable)


def test_the_certificate_must_be_for_the_host(
    kafka_secure: SecureKafka, let_in: Callable[..., KafkaAccess], open_log: Callable[..., KafkaLog]
) -> None:
    with pytest.raises(EventLogError, match="not valid for 'localhost'"):
        open_log(kafka_secure.sasl_ssl.replace("127.0.0.1", "localhost"), let_in())


def test_a_listener_without_sasl_is_named(
    kafka_secure: SecureKafka, let_in: Callable[..., KafkaAccess], open_log: Callable[..., KafkaLog]
) -> None:
    client = kafka_secure.client
    tls = TlsFiles(kafka_secure.authority.cert, client.cert, client.key)

    with pytest.raises(EventLogError, match="offers the SASL mechanisms none, expected SCRAM-SHA-512"):
        open_log(kafka_secure.ssl, let_in(tls=tls))


@pytest.mark.parametrize(
    ("listener", "protocol", "message"),
    [
        ("sasl_ssl", "PLAINTEXT", "Unable to bootstrap from .* by PLAINTEXT; is it the listener's?"),
        ("sasl_ssl", "SSL", "Unable to bootstrap from .* by SSL; is it the listener's?"),
        ("plaintext", "SSL", r"during the TLS handshake \(does the listener speak TLS\?\)"),
        ("plaintext", "SASL_SSL", r"during the TLS handshake \(does the listener speak TLS\?\)"),
    ],
)
def test_another_protocol_than_the_listeners_is_no_answer(
    kafka_secure: SecureKafka,
    let_in: Callable[..., KafkaAccess],
    open_log: Callable[..., KafkaLog],
    listener: str,
    protocol: str,
    message: str,
) -> None:
    where = kafka_secure.server.bootstrap if listener == "plaintext" else kafka_secure.sasl_ssl
    nobody: dict[str, Any] = {} if protocol.startswith("SASL") else {"user": None, "password": None}
    tls = {} if protocol.endswith("SSL") else {"tls": TlsFiles()}

    with pytest.raises(EventLogUnavailable, match=message):
        open_log(where, let_in(protocol=protocol, **nobody, **tls), connect_s=1.0)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, r"event_log\.kafka_access\.password: environment variable NO_SUCH_VARIABLE: not set"),
        ("/no/ca", r"event_log\.kafka_access\.tls: ca_file /no/ca: cannot be read: No such file"),
    ],
)
def test_a_missing_secret_or_file_is_named_at_once(
    kafka_secure: SecureKafka,
    let_in: Callable[..., KafkaAccess],
    open_log: Callable[..., KafkaLog],
    path: str | None,
    message: str,
) -> None:
    changes: dict[str, Any] = {"password": SecretPlace(env="NO_SUCH_VARIABLE")}
    if path is not None:
        changes = {"tls": TlsFiles(ca_file=Path(path))}

    with pytest.raises(SecretError, match=message):
        open_log(kafka_secure.sasl_ssl, let_in(**changes))


@pytest.mark.parametrize(
    ("rights", "doing", "call"),
    [
        ((), "create topic", lambda log: log.ensure_topic("t", 1)),
        ((ACLOperation.DESCRIBE,), "create topic", lambda log: log.ensure_topic("t", 1)),
        ((ACLOperation.DESCRIBE, ACLOperation.CREATE), "append to", lambda log: appended(log)),
        ((ACLOperation.DESCRIBE, ACLOperation.CREATE, ACLOperation.READ), "append to", lambda log: appended(log)),
        ((ACLOperation.DESCRIBE, ACLOperation.CREATE, ACLOperation.WRITE), "read", lambda log: read(log)),
    ],
    ids=["nothing", "no create", "no write", "read only", "no read"],
)
def test_a_missing_right_is_named_with_the_user(
    kafka_secure: SecureKafka,
    user: str,
    let_in: Callable[..., KafkaAccess],
    open_log: Callable[..., KafkaLog],
    namespace: str,
    rights: tuple[ACLOperation, ...],
    doing: str,
    call: Callable[[KafkaLog], object],
) -> None:
    kafka_secure.allow(f"User:{user}", rights, f"{namespace}.")
    log = open_log(kafka_secure.sasl_ssl, let_in(), LONG_S)
    what = rf"Kafka at {kafka_secure.sasl_ssl}: {doing}.*: user '{user}' lacks a right \(ACL\): (Topic|Cluster)Auth"

    with pytest.raises(EventLogError, match=what) as error:
        call(log)
    assert not isinstance(error.value, EventLogUnavailable)
    assert f"{namespace}.t" in str(error.value) or doing == "read"


def appended(log: KafkaLog) -> None:
    log.ensure_topic("t", 1)
    log.append("t", [RECORD])


def read(log: KafkaLog) -> None:
    appended(log)
    log.read({AT: 0}, max_records=10, timeout_s=5.0)


def test_the_clients_debug_messages_hold_no_password(
    kafka_secure: SecureKafka,
    let_in: Callable[..., KafkaAccess],
    open_log: Callable[..., KafkaLog],
    namespace: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    kafka_secure.allow("User:plain", ALL, f"{namespace}.")
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "kafka")

    used(open_log(kafka_secure.sasl_ssl, let_in(user="plain", secret="pl41n", mechanism="PLAIN")))

    assert any(record.name.startswith("kafka") for record in caplog.records)
    assert "pl41n" not in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"protocol": "SASL_SSL"}, "KafkaAccess.user: missing for protocol SASL_SSL, expected a name"),
        ({"protocol": "SASL_SSL", "user": "a"}, "KafkaAccess.password: missing for protocol SASL_SSL, expected file"),
        ({"user": "a"}, "KafkaAccess.user: given for protocol PLAINTEXT, expected SASL_SSL"),
        ({"tls": TlsFiles(ca_file=Path("a"))}, "KafkaAccess.tls: given for protocol PLAINTEXT, expected SSL or"),
        ({"protocol": "TLS"}, "KafkaAccess.protocol: 'TLS', expected one of PLAINTEXT, SSL, SASL_PLAINTEXT, SASL_SSL"),
        ({"mechanism": "GSSAPI"}, "KafkaAccess.mechanism: 'GSSAPI', expected one of PLAIN, SCRAM-SHA-256"),
    ],
)
def test_what_does_not_fit_together_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        KafkaAccess(**arguments)
    assert message in str(error.value)
