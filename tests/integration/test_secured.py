"""Training and serving where Kafka, Redis and the scorer do not let everybody in, and on a Redis Cluster.

The users have the rights that the documentation gives them, and no others. No secret shows anywhere.
"""

import re
import shlex
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from kafka.admin import ACLOperation

from smes_cli.__main__ import run
from smes_cli.demo.processes import stop
from smes_io.redis_access import key_prefix
from tests.running import DEADLINE_S, read_json, start_smes, until, until_log_says, write_config
from tests.secure_servers import RedisCluster, SecureKafka, SecureRedis
from trainer.report import conservation_errors

ROOT = Path(__file__).parents[2]
SECRETS = {"kafka": "k4fka-s3cret", "redis": "r3dis-s3cret", "tokens": "t0ken-0123456789abcdef", "key": "k3y-s3cret"}
SECRETS["signing"] = "s1gning-0123456789abcdef0123456789abcdef"
USERS = ("trainer", "scorer", "features", "producer")


def documented(command: str) -> dict[str, list[str]]:
    """The words after this command in docs/operate/security.md, by user."""
    page = (ROOT / "docs/operate/security.md").read_text().replace("\\\n", " ")
    lines = [shlex.split(line.removeprefix(command)) for line in page.splitlines() if line.startswith(command)]
    return {re.sub("^User:", "", next(w for w in words if not w.startswith("-"))): words for words in lines}


def redis_rules(user: str, namespace: str) -> list[str]:
    _, *rules = documented("redis-cli ACL SETUSER ")[user]
    return [rule.replace("{smes}", key_prefix(namespace)).replace("PASSWORD", SECRETS["redis"]) for rule in rules]


def kafka_operations(user: str) -> list[ACLOperation]:
    page = (ROOT / "docs/operate/security.md").read_text().replace("\\\n", " ")
    (line,) = re.findall(rf"^kafka-acls\.sh .*User:{user} .*$", page, re.MULTILINE)
    return [ACLOperation[name.upper()] for name in re.findall(r"--operation (\w+)", line)]


@pytest.fixture
def places(tmp_path: Path) -> dict[str, dict[str, str]]:
    """Where the secrets are, as the configuration says it."""
    found = {}
    for name, secret in SECRETS.items():
        path = tmp_path / f"secret-{name}"
        path.write_text(f"{secret}\n")
        path.chmod(0o600)
        found[name] = {"file": str(path)}
    return found


Written = Callable[[str], Path]
"""Writes the configuration of a user."""


@pytest.fixture(params=["kafka by TLS and a redis cluster", "redis by TLS"])
def written(
    request: pytest.FixtureRequest, namespace: str, places: dict[str, dict[str, str]], tmp_path: Path
) -> Iterator[Written]:
    more: dict[str, Any] = {
        "scorer": {"port": 0, "poll_s": 0.05, "entity_timeout_ms": 5000, "tokens": places["tokens"]},
        "feature_store": {"signing": {"keys": [{"id": "k1", **places["signing"]}]}},
    }
    of_servers = on_kafka_and_a_cluster if "kafka" in request.param else on_redis
    with of_servers(request, namespace, places) as (url, kafka, of_user):

        def write(user: str) -> Path:
            path = write_config(tmp_path / user, url, namespace, kafka=kafka, **more)
            data = yaml.safe_load(path.read_text())
            for section, keys in of_user(user).items():
                data[section] |= keys
            path.write_text(yaml.safe_dump(data))
            return path

        yield write


OfUser = Callable[[str], dict[str, dict[str, Any]]]
"""What a user's configuration says of access, by section."""


@contextmanager
def on_kafka_and_a_cluster(
    request: pytest.FixtureRequest, namespace: str, places: dict[str, dict[str, str]]
) -> Iterator[tuple[str, str | None, OfUser]]:
    kafka: SecureKafka = request.getfixturevalue("kafka_secure")
    cluster: RedisCluster = request.getfixturevalue("cluster")
    for user in ("trainer", "producer"):
        kafka.add_user(f"{user}-{namespace}", SECRETS["kafka"])
        kafka.allow(f"User:{user}-{namespace}", kafka_operations(user), f"{namespace}.")
    ca = {"ca_file": str(kafka.authority.cert)}
    access = {"protocol": "SASL_SSL", "password": places["kafka"], "tls": ca}
    url = cluster.url((cluster.owner(key_prefix(namespace)) + 1) % 3)
    yield (
        url,
        kafka.sasl_ssl,
        lambda user: {
            "event_log": {"kafka_access": {**access, "user": f"{user}-{namespace}"}},
            "feature_store": {"redis_access": {"cluster": True}},
        },
    )


@contextmanager
def on_redis(
    request: pytest.FixtureRequest, namespace: str, places: dict[str, dict[str, str]]
) -> Iterator[tuple[str, str | None, OfUser]]:
    redis: SecureRedis = request.getfixturevalue("redis_secure")
    client = redis.authority.signed(f"client-{namespace}", password=SECRETS["key"])
    files = {"ca_file": str(redis.authority.cert), "cert_file": str(client.cert), "key_file": str(client.key)}
    tls = {**files, "key_password": places["key"]}
    for user in USERS:
        redis.set_user(user, *redis_rules(user, namespace))

    def of_user(user: str) -> dict[str, dict[str, Any]]:
        access = {"redis_access": {"user": user, "password": places["redis"], "tls": tls}}
        return {"event_log": access, "feature_store": access}

    yield redis.url, None, of_user
    for user in USERS:
        redis.owner.execute_command("ACL DELUSER", user)


def processes_as_ps_shows_them() -> str:
    """Every process with its arguments and, where we may see it, its environment."""
    return subprocess.run(["ps", "auxeww"], capture_output=True, text=True, check=True).stdout


@pytest.mark.kafka
@pytest.mark.timeout(400)
@pytest.mark.xdist_group("kafka_secure")
def test_documented_rights_are_enough_and_no_secret_shows(
    written: Written, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, scorer, features, producer = (str(written(user)) for user in USERS)
    logs = {name: tmp_path / f"{name}.log" for name in ("train", "serve")}

    def said(user: str, *arguments: str) -> str:
        """What a command writes, which is run in this process: that takes no time to start."""
        code = run(["-v", "-c", user, *arguments])
        output = "".join(capsys.readouterr())
        assert code == 0, output
        return output

    train = start_smes(logs["train"], "-v", "-c", trainer, "train", "--drain", "--report", "train.json")
    serve = start_smes(logs["serve"], "-v", "-c", scorer, "serve")
    loaded = said(features, "features", "load", str(world))
    sent = said(producer, "replay", str(world), "--speed", "max", "--report", str(tmp_path / "replay.json"))
    until_log_says(logs["serve"], "scorer: listening on http://", serve)
    url = logs["serve"].read_text().split("listening on ")[1].split()[0]
    bearer = {"authorization": f"Bearer {SECRETS['tokens']}"}
    with httpx.Client(base_url=url, timeout=30) as http:
        until(lambda: http.get("/health/ready").status_code == 200, "a snapshot in service")
        scored = http.post("/v1/score", json={"user_id": 1, "items": [1, 2]}, headers=bearer)
        refused = [
            http.get("/metrics"),
            http.get("/v1/stats"),
            http.post("/v1/score", json={"user_id": 1, "items": [1]}),
        ]
        seen = processes_as_ps_shows_them()
        raw = first_bytes(url)
        assert stop(train, timeout_s=DEADLINE_S) == 0, logs["train"].read_text()
        report = read_json(tmp_path / "train.json")
        until(lambda: http.get("/v1/stats", headers=bearer).json()["version"] == report["version"], "the last version")
        details = http.get("/health/ready", headers=bearer).json()
        shown = http.get("/metrics", headers=bearer).text + http.get("/v1/stats", headers=bearer).text
        rolled_back = said(trainer, "snapshots", "rollback", "--why", "a test")
        until(lambda: http.get("/v1/stats", headers=bearer).json()["version"] < report["version"], "the version before")
    listed, one = said(scorer, "snapshots", "list"), said(scorer, "snapshots", "show")
    assert stop(serve, timeout_s=DEADLINE_S) == 0

    assert (scored.status_code, [answer.status_code for answer in refused]) == (200, [401] * 3)
    assert conservation_errors(report) == []
    assert report["events"]["trained"] > 1000
    assert (details["status"], set(details["problems"].values())) == ("ready", {None})
    assert re.search(r'"signature": "k1:[0-9a-f]{64}"', one)
    assert b"server:" not in raw.lower()
    assert b"uvicorn" not in raw.lower()
    assert "smes_cli" in seen
    everything = [seen, shown, loaded, sent, rolled_back, listed, one, *(path.read_text() for path in logs.values())]
    everything += [(tmp_path / name).read_text() for name in ("train.json", "replay.json")]
    assert not [secret for secret in SECRETS.values() if any(secret in text for text in everything)]


def first_bytes(url: str) -> bytes:
    """What a scorer sends to a caller without a token, as it comes over the wire."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n")
        received = b""
        while piece := connection.recv(65_536):
            received += piece
    return received


@pytest.mark.kafka
@pytest.mark.xdist_group("kafka_secure")
@pytest.mark.parametrize("command", [["train"], ["replay", "WORLD"]])
@pytest.mark.parametrize("wrong", ["kafka", "redis"])
def test_a_command_that_is_not_let_in_says_why_in_one_line(
    kafka_secure: SecureKafka,
    redis_secure: SecureRedis,
    namespace: str,
    world: Path,
    tmp_path: Path,
    wrong: str,
    command: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    password = tmp_path / "password"
    password.write_text("wr0ng-s3cret")
    kafka = wrong == "kafka"
    ca = str((kafka_secure if kafka else redis_secure).authority.cert)
    client = redis_secure.client
    tls = {"ca_file": ca} | ({} if kafka else {"cert_file": str(client.cert), "key_file": str(client.key)})
    access: dict[str, Any] = {"user": "nobody", "password": {"file": str(password)}, "tls": tls}
    path = write_config(
        tmp_path,
        redis_secure.url,
        namespace,
        kafka=kafka_secure.sasl_ssl if kafka else None,
        event_log={"kafka_access": {"protocol": "SASL_SSL", **access}} if kafka else {"redis_access": access},
    )

    code = run(["-v", "-c", str(path), *(str(world) if word == "WORLD" else word for word in command)])

    out, err = capsys.readouterr()
    last = err.strip().splitlines()[-1]
    server = kafka_secure.sasl_ssl if kafka else redis_secure.url.removeprefix("rediss://")
    assert code == 1
    assert last.startswith("smes: ")
    assert server in last
    assert "refused the credentials" in last
    assert "nobody" in last
    assert "wr0ng-s3cret" not in out + err
