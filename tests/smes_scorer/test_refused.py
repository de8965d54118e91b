"""What is refused is named, by its reason, in health and metrics, while a real scorer goes on answering over HTTP."""

import random
import re
from collections.abc import Callable
from contextlib import AbstractContextManager

import httpx
import pytest
import redis

from feature_store.manifest import Manifest, SnapshotKeys
from feature_store.pins import Decision
from feature_store.pointer import Pointer
from feature_store.signing import KeyPlace, Signer, SigningConfig
from feature_store.snapshots import SnapshotStore
from smes.errors import LeaseLost
from smes.schema import Schema

Publish = Callable[..., Manifest]
Ready = Callable[..., AbstractContextManager[httpx.Client]]
Until = Callable[[Callable[[], object]], None]

SIGNING = SigningConfig((KeyPlace(id="k1", env="TEST_SIGNING_KEY"),))
BYTES = random.Random(0).randbytes(60)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_SIGNING_KEY", "0123456789abcdef" * 4)


class Store:
    """A signed store with a key to it, and one without a key that others write to.

    Attributes:
        store: Publishes signed.
        client: Writes whatever it likes.
        prefix: Of the keys.
    """

    def __init__(self, client: redis.Redis, namespace: str, publish: Publish, schema: Schema) -> None:
        self.namespace, self.schema = namespace, schema
        self.signer = Signer.of(SIGNING, namespace)
        self.client, self.prefix = client, SnapshotKeys(namespace).key("")
        self.store = SnapshotStore(client, namespace, signer=self.signer)
        self._publish = publish

    def publish(self, version: int, **more: object) -> Manifest:
        return self._publish(self.store, version, **more)

    def text(self, key: str, name: str) -> bytes:
        value = self.client.hget(f"{self.prefix}{key}", name)
        assert isinstance(value, bytes)
        return value

    def point_to(self, name: str) -> None:
        """As a publication does last, so that what was changed before is there when scorers look."""
        now_ms = int(self.client.time()[0]) * 1000 + 1000
        self.client.set(f"{self.prefix}current", Pointer(name, now_ms).text(self.signer))

    def aside(self) -> Manifest:
        """Version 2, which is not current yet."""
        return self.store.publish(
            b"?" * 100,
            lineage="a",
            version=2,
            schema_hash=self.schema.hash,
            step=2,
            created_ms=0,
            held="waits for point_to",
        )


@pytest.fixture
def signed(client: redis.Redis, namespace: str, publish: Publish, schema: Schema) -> Store:
    return Store(client, namespace, publish, schema)


def damaged_chunk(s: Store) -> None:
    manifest = s.aside()
    s.client.set(f"{s.prefix}chunk:{manifest.upload}:0", b"!" * manifest.total_bytes)
    s.point_to("a:2")


def evicted_chunk(s: Store) -> None:
    manifest = s.aside()
    s.client.zadd(f"{s.prefix}index", {"a:2": 7})
    s.client.delete(f"{s.prefix}chunk:{manifest.upload}:0")
    s.point_to("a:2")


def forged_manifest(s: Store) -> None:
    s.aside()
    s.client.hset(f"{s.prefix}manifests", "a:2", s.text("manifests", "a:2").replace(b'"step":2', b'"step":3'))
    s.point_to("a:2")


def of_another_namespace(s: Store) -> None:
    other = f"{s.namespace}-2"
    theirs = SnapshotStore(s.client, other, signer=Signer.of(SIGNING, other))
    s._publish(theirs, 2)
    text = s.client.hget(SnapshotKeys(other).key("manifests"), "a:2")
    assert isinstance(text, bytes)
    s.client.hset(f"{s.prefix}manifests", "a:2", text)
    s.point_to("a:2")


def of_another_version(s: Store) -> None:
    s.client.hset(f"{s.prefix}manifests", "a:2", s.text("manifests", "a:1"))
    s.point_to("a:2")


def unsigned_pointer(s: Store) -> None:
    s.aside()
    s.client.set(f"{s.prefix}current", "a:2")


def held_by_its_pointer(s: Store) -> None:
    s.aside()
    current = s.client.get(f"{s.prefix}current")
    assert isinstance(current, bytes)
    s.client.set(f"{s.prefix}current", current.replace(b"a:1 ", b"a:2 "))


def unsigned_publication(s: Store) -> None:
    s._publish(SnapshotStore(s.client, s.namespace), 2)


def another_schema(s: Store) -> None:
    s.publish(2, schema_hash="0" * 16)


def no_model(s: Store) -> None:
    s.publish(2, payload=b"junk")


def broken_manifest(s: Store) -> None:
    s.client.hset(f"{s.prefix}manifests", "a:2", BYTES)
    s.point_to("a:2")


def broken_pointer(s: Store) -> None:
    s.client.set(f"{s.prefix}current", BYTES)


def zombie(s: Store) -> None:
    one = s.store.acquire("zombie", 60.0)
    s.client.delete(f"{s.prefix}lease")
    s.store.acquire("successor", 60.0)
    with pytest.raises(LeaseLost):
        s.store.publish(b"x", lineage="a", version=2, schema_hash="h", step=2, created_ms=0, fencing=one.number)


def decision(s: Store, **more: object) -> Decision:
    now_ms = int(s.client.time()[0]) * 1000
    fields: dict[str, object] = {"number": now_ms, "action": "pin", "lineage": "a", "version": 1}
    fields |= {"current": "a:1", "before": "a:1", "rolled_back": None, "why": "", "by": "somebody", "at_ms": now_ms}
    return Decision(**fields | more)  # type: ignore[arg-type]  # tests name the fields


def unsigned_pin(s: Store) -> None:
    s.client.set(f"{s.prefix}decision", decision(s).text(Signer(s.namespace)))


def pin_to_nothing(s: Store) -> None:
    s.client.set(f"{s.prefix}decision", decision(s, version=7).text(s.signer))


def junk_pin(s: Store) -> None:
    s.client.lpush(f"{s.prefix}decision", "x")


ATTACKS: dict[str, tuple[Callable[[Store], None], str, str]] = {
    "a damaged chunk": (damaged_chunk, "chunk", r"snapshot a:2: chunk 0 of 1: SHA-256 \w+…, expected \w+…"),
    "an evicted chunk": (evicted_chunk, "chunk", r"snapshot a:2: chunk 0 of 1: missing, though the snapshot is listed"),
    "a forged manifest": (forged_manifest, "signature", r"a:2: manifest: the signature by key k1 is not of this"),
    "a manifest of another namespace": (of_another_namespace, "signature", r"a:2: manifest: the signature by key k1"),
    "a manifest of another version": (of_another_version, "manifest", r"the manifest of a:1, expected that of a:2"),
    "an unsigned pointer": (unsigned_pointer, "signature", r"current: pointer: unsigned, expected a signature by"),
    "a pointer to what was kept aside": (held_by_its_pointer, "signature", r"current: pointer: the signature by key"),
    "an unsigned publication": (unsigned_publication, "signature", r"(pointer|manifest): unsigned, expected"),
    "another schema": (another_schema, "schema", r"snapshot a:2: schema hash 0{16} differs from the configured"),
    "bytes that make no model": (no_model, "payload", r"snapshot payload: header cut short"),
    "a broken manifest": (broken_manifest, "manifest", r"a:2: snapshot manifest: expected JSON"),
    "a broken pointer": (broken_pointer, "pointer", r"snapshots:current: .*, expected lineage:version"),
    "a zombie's commit": (zombie, "fenced", r"a:2, published with the lease with number \d+ at .* has the lease"),
    "an unsigned pin": (unsigned_pin, "signature", r"decision: pin: unsigned, expected a signature by key k1"),
    "a pin to a version that is gone": (pin_to_nothing, "pin", r"snapshot a:7: pinned by somebody, but it is gone"),
    "a junk pin": (junk_pin, "signature", r"decision: pin: unsigned"),
}


def refusals(http: httpx.Client, reason: str) -> int:
    found = re.search(rf'^smes_scorer_refusals_total{{reason="{reason}"}} (\S+)$', http.get("/metrics").text, re.M)
    assert found is not None
    return int(float(found[1]))


def counts_agree(http: httpx.Client, reason: str) -> None:
    """Health and metrics count the same refusals, which may go on: one count is taken before and after the other."""
    least = refusals(http, reason)
    count = refused(http)[reason]["count"]
    assert 1 <= least <= count <= refusals(http, reason)  # type: ignore[operator]


def refused(http: httpx.Client) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = http.get("/health/ready").json()["refused"]
    return found


def assert_answers(http: httpx.Client, version: int) -> None:
    for _ in range(3):
        answer = http.post("/v1/score", json={"user_id": 1, "items": [1, 2]})
        assert (answer.status_code, answer.json()["version"]) == (200, version)


@pytest.mark.parametrize(("attack", "reason", "message"), ATTACKS.values(), ids=ATTACKS)
def test_what_is_refused_is_named_and_answers_go_on(
    signed: Store, ready: Ready, until: Until, attack: Callable[[Store], None], reason: str, message: str
) -> None:
    signed.publish(1)
    with ready(signing=SIGNING) as http:
        assert refused(http) == {}
        assert_answers(http, 1)

        attack(signed)
        until(lambda: reason in refused(http))

        last = refused(http)[reason]
        assert re.search(message, str(last["last"]))
        assert str(last["at"]).startswith("20")
        counts_agree(http, reason)
        assert_answers(http, 1)
        assert http.get("/health/ready").status_code == http.get("/health/live").status_code == 200
        if reason != "fenced":  # which the store refused, so that nothing is wrong with what is served
            until(lambda: re.search(message, str(http.get("/health/ready").json()["problems"]["snapshots"])))


@pytest.mark.parametrize("keys", [None, SIGNING], ids=["unsigned", "signed"])
def test_a_version_that_goes_back_is_refused_and_named(
    client: redis.Redis,
    namespace: str,
    publish: Publish,
    ready: Ready,
    until: Until,
    keys: SigningConfig | None,
) -> None:
    pointer = SnapshotKeys(namespace).key("current")
    store = SnapshotStore(client, namespace, signer=Signer.of(keys or SigningConfig(), namespace))
    publish(store, 1)
    old = client.get(pointer)
    assert isinstance(old, bytes)
    publish(store, 2)
    with ready(signing=keys) as http:
        client.set(pointer, old)
        until(lambda: refusals(http, "older"))
        assert_answers(http, 2)
        wrong = "version 1 is|a:1, signed before"
        until(lambda: re.search(wrong, str(http.get("/health/ready").json()["problems"]["snapshots"])))

        publish(store, 3)
        until(lambda: http.get("/health/ready").json()["version"] == 3)
        until(lambda: http.get("/health/ready").json()["status"] == "ready")


def test_an_older_lineage_does_not_come_back_either(signed: Store, ready: Ready, until: Until) -> None:
    signed.publish(9)
    old = signed.client.get(f"{signed.prefix}current")
    assert isinstance(old, bytes)
    signed.publish(1, lineage="b")
    with ready(signing=SIGNING) as http:
        signed.client.set(f"{signed.prefix}current", old)
        signed.client.zadd(f"{signed.prefix}index", {"a:9": 1e9})
        until(lambda: refusals(http, "older"))
        assert_answers(http, 1)


def test_an_older_decision_of_an_operator_does_not_come_back(signed: Store, ready: Ready, until: Until) -> None:
    signed.publish(1)
    signed.publish(2)
    key, operator = f"{signed.prefix}decision", signed.store.operator
    with ready(signing=SIGNING) as http:
        operator.pin(1, by="somebody")
        until(lambda: http.get("/health/ready").json()["version"] == 1)
        old = signed.client.get(key)
        assert isinstance(old, bytes)
        operator.unpin(by="somebody")
        until(lambda: http.get("/health/ready").json()["version"] == 2)

        signed.client.set(key, old)
        until(lambda: refusals(http, "pin"))
        assert_answers(http, 2)
        assert re.search(r"decision \d+, expected \d+ or later", str(refused(http)["pin"]["last"]))

        signed.client.delete(key, f"{key}s")
        until(lambda: http.get("/health/ready").json()["status"] == "ready")
        assert_answers(http, 2)


NAMES = ["current", "manifests", "bases", "index", "history", "held", "sequence", "uploads", "lease", "fencing"]
NAMES += ["fenced", "decision", "decisions"]


@pytest.mark.parametrize("keys", [None, SIGNING], ids=["unsigned", "signed"])
def test_junk_in_every_key_is_named_and_the_next_publication_is_served(
    client: redis.Redis, namespace: str, publish: Publish, ready: Ready, until: Until, keys: SigningConfig | None
) -> None:
    store = SnapshotStore(client, namespace, signer=Signer.of(keys or SigningConfig(), namespace))
    rng = random.Random(1)
    manifest = publish(store, 1)
    with ready(signing=keys) as http:
        for round in range(2):
            for name in (*NAMES, f"chunk:{manifest.upload}:0"):
                key = SnapshotKeys(namespace).key(name)
                kind = client.type(key)
                client.delete(key)
                if round == 0 and kind != b"string":
                    client.set(key, rng.randbytes(50))
                elif round == 0:
                    client.rpush(key, rng.randbytes(50))
                elif kind == b"hash":
                    client.hset(key, rng.randbytes(20), rng.randbytes(50))
                elif kind == b"zset":
                    client.zadd(key, {rng.randbytes(20): rng.random()})
                else:
                    client.set(key, rng.randbytes(50))
            until(lambda: http.get("/health/ready").json()["status"] == "degraded")
            assert_answers(http, 1 + round)
            assert refused(http)

            client.delete(SnapshotKeys(namespace).key("decision"))  # which nobody made
            manifest = publish(store, 2 + round)
            until(lambda round=round: http.get("/health/ready").json()["version"] == 2 + round)  # type: ignore[misc]
            assert_answers(http, 2 + round)
