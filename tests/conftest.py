"""Real servers for the tests, started once per session, and a namespace for each test."""

import logging
import os
import shutil
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from smes_cli.console import console
from smes_cli.demo.local_servers import KafkaServer, start_kafka, start_valkey
from tests.secure_servers import (
    RedisCluster,
    SecureKafka,
    SecureRedis,
    redis_cluster,
    secure_kafka,
    secure_redis,
    tls_redis_program,
)

_ROOT = Path(__file__).resolve().parent.parent

# How long an example takes depends on what else the machine does.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """What a command sets for its process is as it was after each test: logging, and whether it prints.

    Fixtures of a module or a session may run commands, too; so this is no fixture.
    """
    root = logging.getLogger()
    handlers, quiet = root.handlers[:], console.quiet
    levels = _logger_levels()
    try:
        return (yield)
    finally:
        for logger in _logger_levels():
            logger.setLevel(levels.get(logger, logging.NOTSET))
        root.handlers[:], console.quiet = handlers, quiet


def _logger_levels() -> dict[logging.Logger, int]:
    named = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    return {logger: logger.level for logger in (logging.root, *named)}


def _missing(reason: str) -> None:
    """Skip the test. Under continuous integration fail instead, so that a missing server is noticed."""
    if os.environ.get("CI"):
        pytest.fail(f"with CI set this is a failure: {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Redis or Valkey: the one at ``REDIS_URL``, or one that is started for the session."""
    if url := os.environ.get("REDIS_URL"):
        yield url
        return
    with start_valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server.url


@pytest.fixture(scope="session")
def kafka_home() -> Path:
    """A Kafka distribution that can be started: ``KAFKA_HOME``, else ``../shared/kafka``, with Java on PATH."""
    home = Path(os.environ.get("KAFKA_HOME", _ROOT.parent / "shared" / "kafka"))
    if not (home / "libs").is_dir():
        _missing(f"no Kafka: KAFKA_BOOTSTRAP is not set and {home} (KAFKA_HOME) has no libs folder")
    if shutil.which("java") is None:
        _missing("no Kafka: KAFKA_BOOTSTRAP is not set and java is not on PATH")
    return home


@pytest.fixture(scope="session")
def kafka_server(kafka_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaServer]:
    """A real Apache Kafka of a single node, started for the session. A test may hold it up, but lets it go on."""
    with start_kafka(kafka_home, tmp_path_factory.mktemp("kafka")) as server:
        yield server


@pytest.fixture(scope="session")
def kafka_bootstrap(request: pytest.FixtureRequest) -> str:
    """A real Apache Kafka: the one at ``KAFKA_BOOTSTRAP``, or :func:`kafka_server`."""
    if bootstrap := os.environ.get("KAFKA_BOOTSTRAP"):
        return bootstrap
    server: KafkaServer = request.getfixturevalue("kafka_server")
    return server.bootstrap


@pytest.fixture(scope="session")
def kafka_secure(kafka_home: Path, openssl: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureKafka]:
    """A real Kafka with TLS, SASL and ACLs; its user of PLAIN is ``plain``, with the password ``pl41n``."""
    with secure_kafka(kafka_home, tmp_path_factory.mktemp("kafka-secure"), {"plain": "pl41n"}) as kafka:
        yield kafka


@pytest.fixture(scope="session")
def redis_secure(openssl: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureRedis]:
    """A real Redis with TLS and ACL users."""
    program = tls_redis_program()
    if program is None:
        _missing("no Redis that speaks TLS: install redis-tools or valkey-tools of Debian")
    with secure_redis(str(program), tmp_path_factory.mktemp("redis-secure")) as server:
        yield server


@pytest.fixture(scope="session")
def openssl() -> None:
    """The command that makes certificates."""
    if shutil.which("openssl") is None:
        _missing("no certificates: openssl is not on PATH")


@pytest.fixture(scope="session")
def prometheus() -> None:
    """The programs ``prometheus`` and ``promtool``."""
    if shutil.which("prometheus") is None or shutil.which("promtool") is None:
        _missing("no Prometheus: install prometheus of Debian")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    """A real Redis Cluster of three Valkey nodes."""
    with redis_cluster(tmp_path_factory.mktemp("cluster")) as nodes:
        yield nodes


@pytest.fixture
def namespace() -> str:
    """A unique name: the prefix of the test's Redis keys and Kafka topics."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def kuairand_dir() -> Path:
    """A KuaiRand folder: ``KUAIRAND_HOME``, else ``../shared/kuairand_pure``."""
    folder = Path(os.environ.get("KUAIRAND_HOME", _ROOT.parent / "shared" / "kuairand_pure"))
    if not folder.is_dir():
        _missing(f"no KuaiRand data: {folder} (KUAIRAND_HOME) does not exist")
    return folder
