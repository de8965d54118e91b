"""What those cannot do who may write to Redis but have no key: every record is judged by its signature."""

import hashlib
import hmac
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from feature_store.config import FeatureStoreConfig, SnapshotStoreConfig
from feature_store.pieces import Payload
from feature_store.pointer import Pointer
from feature_store.signing import KeyPlace, Signer, SigningConfig
from feature_store.snapshots import SnapshotStore
from smes.errors import LeaseLost, SnapshotDamaged, SnapshotError, SnapshotForged, SnapshotNotFound
from smes_io.secrets import SecretError
from smes_io.yaml_file import validated
from tests.feature_store.test_damage import publish

K1, K2 = "one " * 10, "two " * 10


def signer_of(namespace: str, **keys: str) -> Signer:
    return Signer(namespace, tuple((id, key.encode()) for id, key in keys.items()))


@pytest.fixture
def make_store(client: redis.Redis, namespace: str) -> Callable[..., SnapshotStore]:
    """Stores with these keys, by id."""

    def make_store(namespace: str = namespace, **keys: str) -> SnapshotStore:
        sizes = SnapshotStoreConfig(chunk_bytes=1000)
        return SnapshotStore(client, namespace, sizes, signer=signer_of(namespace, **keys))

    return make_store


@pytest.fixture
def store(make_store: Callable[..., SnapshotStore]) -> SnapshotStore:
    return make_store(k1=K1)


@pytest.fixture
def prefix(namespace: str) -> str:
    return f"{{{namespace}}}:snapshots:"


def test_a_signature_is_the_hmac_of_every_part_with_its_length() -> None:
    parts = [b"smes snapshots 1", b"pin", "ñ".encode(), b"k1", b"record"]
    message = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    expected = hmac.digest(K1.encode(), message, hashlib.sha256).hex()

    assert signer_of("ñ", k1=K1, k2=K2).sign("pin", b"record") == f"k1:{expected}"


def test_without_keys_nothing_is_signed_and_nothing_refused() -> None:
    signer = Signer("n")

    assert (signer.active, signer.sign("pin", b"record")) == (False, None)
    signer.verify("pin", b"record", None)
    signer.verify("pin", b"record", "junk")


@pytest.mark.parametrize("signature", ["k1:" + "0" * 64, "k1:", "", "x", "k1:" + "A" * 64, "ä" * 70, "k9:" + "0" * 64])
def test_a_signature_of_another_kind_place_key_or_form_is_refused(signature: str) -> None:
    signer = signer_of("n", k1=K1)
    good = signer.sign("pin", b"record")
    signer.verify("pin", b"record", good)

    for other, kind, record in [
        (signer, "pointer", b"record"),
        (signer, "pin", b"record "),
        (signer_of("m", k1=K1), "pin", b"record"),
        (signer_of("n", k1=K2), "pin", b"record"),
        (signer_of("n", k2=K1), "pin", b"record"),
    ]:
        with pytest.raises(SnapshotForged):
            other.verify(kind, record, good)  # type: ignore[arg-type]  # the kinds are among those named
    for wrong in (signature, None):
        with pytest.raises(SnapshotForged):
            signer.verify("pin", b"record", wrong)


def test_keys_come_from_files_and_variables_and_are_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text(K1 + "\n")
    monkeypatch.setenv("KEY_TWO", K2)
    data = {"signing": {"keys": [{"id": "k1", "file": str(tmp_path / "key")}, {"id": "k2", "env": "KEY_TWO"}]}}
    config = validated(FeatureStoreConfig, data, "test").signing

    signer = Signer.of(config, "n")

    assert signer.sign("pin", b"r") == signer_of("n", k1=K1).sign("pin", b"r")
    signer.verify("pin", b"r", signer_of("n", k2=K2).sign("pin", b"r"))
    for text in (repr(config), str(config), repr(signer), str(signer)):
        assert "one one" not in text
        assert "two two" not in text


@pytest.mark.parametrize("text", ["too short to be a key", "", "pass" * 7 + "wor"])
def test_a_key_that_is_too_short_is_refused_and_not_shown(tmp_path: Path, text: str) -> None:
    (tmp_path / "key").write_text(text)

    with pytest.raises(SecretError) as caught:
        Signer.of(SigningConfig((KeyPlace(id="k1", file=tmp_path / "key"),)), "n")

    assert f"feature_store.signing.keys, k1: file {tmp_path / 'key'}: " in str(caught.value)
    assert not text or text not in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [
        [{"id": "a b", "env": "X"}],
        [{"id": "", "env": "X"}],
        [{"id": "k1"}],
        [{"id": "k1", "env": "X", "file": "y"}],
        [{"env": "X"}],
        [{"id": "k1", "env": "X"}, {"id": "k1", "env": "Y"}],
    ],
)
def test_a_wrong_list_of_keys_is_refused(keys: list[dict[str, str]]) -> None:
    with pytest.raises(ValueError, match="expected"):
        validated(FeatureStoreConfig, {"signing": {"keys": keys}}, "test")


def test_what_was_signed_is_read_by_every_store_that_knows_the_key(
    store: SnapshotStore, make_store: Callable[..., SnapshotStore]
) -> None:
    first = publish(store, 1)
    second = publish(make_store(k2=K2, k1=K1), 2)  # rotated: the new key signs, the old one still verifies

    assert (first.signature or "")[:3] == "k1:"
    assert (second.signature or "")[:3] == "k2:"
    for reader in (make_store(k1=K1, k2=K2), make_store(k2=K2, k1=K1), make_store()):
        assert reader.current() == second
        assert reader.list() == (first, second)
        assert reader.load(second) == b"\2" * 2500


def test_a_store_with_keys_refuses_what_was_published_without(
    store: SnapshotStore, make_store: Callable[..., SnapshotStore]
) -> None:
    publish(make_store(), 1)

    with pytest.raises(SnapshotError, match="current: pointer: unsigned, expected a signature by key k1"):
        store.current()
    with pytest.raises(SnapshotForged, match="a:1: manifest: unsigned"):
        store.get("a", 1)
    assert store.list() == ()

    published = publish(store, 2)
    assert store.current() == published
    assert published.parent is None


Attack = Callable[[redis.Redis, str], object]


def stored(client: redis.Redis, key: str, field: str | None = None) -> bytes:
    value = client.get(key) if field is None else client.hget(key, field)
    assert isinstance(value, bytes)
    return value


def replaced(c: redis.Redis, p: str, name: str, before: bytes, after: bytes) -> None:
    text = stored(c, f"{p}manifests", name)
    assert before in text
    c.hset(f"{p}manifests", name, text.replace(before, after))


def unsigned(c: redis.Redis, p: str) -> None:
    text = stored(c, f"{p}manifests", "a:2")
    c.hset(f"{p}manifests", "a:2", text[: text.index(b'"signature":')] + b'"signature":null}')


def moved(c: redis.Redis, p: str) -> None:
    text = stored(c, f"{p}manifests", "a:2")
    at = text.index(b'"signature":')
    c.hset(f"{p}manifests", "a:2", b"{" + text[at:-1] + b"," + text[1 : at - 1] + b"}")


FORGED: dict[str, Attack] = {
    "another schema": lambda c, p: replaced(c, p, "a:2", b'"schema_hash":"h"', b'"schema_hash":"g"'),
    "other metrics": lambda c, p: replaced(c, p, "a:2", b'"metrics":{}', b'"metrics":{"x":1}'),
    "another chunk": lambda c, p: replaced(c, p, "a:2", hashlib.sha256(b"\2" * 1000).hexdigest().encode(), b"a" * 64),
    "no signature": unsigned,
    "the signature is not the last field": moved,
    "a space": lambda c, p: replaced(c, p, "a:2", b'"version":2', b'"version": 2'),
    "twice the field": lambda c, p: replaced(c, p, "a:2", b'"step":2', b'"step":2,"step":7'),
}


@pytest.mark.parametrize("attack", FORGED.values(), ids=FORGED)
def test_a_changed_manifest_is_refused_and_the_one_before_found(
    client: redis.Redis, prefix: str, store: SnapshotStore, attack: Attack
) -> None:
    first = publish(store, 1)
    publish(store, 2)
    attack(client, prefix)

    with pytest.raises(SnapshotForged, match=r"manifests, a:2: manifest: "):
        store.get("a", 2)
    assert store.current() == first
    assert store.list() == (first,)
    assert "manifests, a:2: manifest: " in str(store.pointer_problem)

    third = publish(store, 3)
    assert store.current() == third


def test_a_manifest_of_another_namespace_version_or_kind_is_refused(
    client: redis.Redis, namespace: str, prefix: str, make_store: Callable[..., SnapshotStore], store: SnapshotStore
) -> None:
    elsewhere = make_store(f"{namespace}-2", k1=K1)
    publish(store, 1)
    publish(store, 2, applies_to={1})
    publish(elsewhere, 3)
    theirs = stored(client, f"{{{namespace}-2}}:snapshots:manifests", "a:3")
    own = stored(client, f"{prefix}manifests", "a:1")
    delta = stored(client, f"{prefix}manifests", "a:2")

    client.hset(f"{prefix}manifests", mapping={"a:3": theirs, "a:4": own, "b:1": own})
    client.hset(f"{prefix}bases", mapping={"a:1": own, "a:2": delta})

    with pytest.raises(SnapshotForged, match=f"not of this manifest in namespace {namespace}: "):
        store.get("a", 3)
    for lineage, version in (("a", 4), ("b", 1)):
        with pytest.raises(SnapshotError, match="the manifest of a:1, expected that of"):
            store.get(lineage, version)
    assert store.bases(store.list()) == {}
    assert "not of this base in" in str(store.damage.last)


def test_an_older_pointer_does_not_come_back_and_what_is_kept_aside_does_not_become_current(
    client: redis.Redis, prefix: str, store: SnapshotStore, make_store: Callable[..., SnapshotStore]
) -> None:
    publish(store, 1)
    old = stored(client, f"{prefix}current")
    second = publish(store, 2)
    publish(store, 3, held="too good")
    reader = make_store(k1=K1)
    assert reader.current() == second

    client.set(f"{prefix}current", old)
    assert reader.current() == second
    assert "current: a:1, signed before what was read last" in str(reader.pointer_problem)

    client.zadd(f"{prefix}index", {"a:1": 1e9, "a:3": 1e10})
    for forged in (b"a:3", b"a:1", old.replace(b"a:1 ", b"a:3 "), old.replace(b"a:1 ", b"a:1 9"), b"a:3 1 k1:0"):
        client.set(f"{prefix}current", forged)
        assert make_store(k1=K1).current() == second
        assert reader.pointer() is None
        assert reader.current() == second


def test_a_reader_without_keys_follows_a_trainer_that_signs_no_more(make_store: Callable[..., SnapshotStore]) -> None:
    reader = make_store()
    signed = publish(make_store(k1=K1), 1)
    assert reader.current() == signed

    unsigned = publish(make_store(), 2)

    assert reader.current() == unsigned
    assert reader.pointer_problem is None


def test_the_next_publication_takes_no_heed_of_a_forged_pointer(
    client: redis.Redis, prefix: str, store: SnapshotStore, make_store: Callable[..., SnapshotStore]
) -> None:
    publish(store, 1)
    publish(make_store(k1=K2), 200)  # signed, with another key of the same name

    with pytest.raises(SnapshotNotFound):
        store.get("a", 3)
    third = publish(store, 3)

    assert store.current() == third
    assert stored(client, f"{prefix}current").startswith(b"a:3 ")


def test_a_pointer_is_signed_with_a_higher_order_than_the_one_before(
    client: redis.Redis, prefix: str, namespace: str, store: SnapshotStore
) -> None:
    ahead = Pointer("a:1", 10**15)
    publish(store, 1)
    client.set(f"{prefix}current", ahead.text(signer_of(namespace, k1=K1)))  # as if the clock had been far ahead

    publish(store, 2)

    order = stored(client, f"{prefix}current").split()[1]
    assert int(order) == 10**15 + 1


def test_no_byte_of_a_chunk_is_used_before_all_of_it_was_verified(
    client: redis.Redis, prefix: str, store: SnapshotStore
) -> None:
    manifest = publish(store, 1)
    client.setrange(f"{prefix}chunk:{manifest.upload}:1", 999, b"x")
    pieces = store.pieces(manifest)

    assert next(pieces) == b"\1" * 1000
    with pytest.raises(SnapshotDamaged, match="chunk 1 of 3: SHA-256"):
        next(pieces)


def test_bases_and_deltas_are_signed_too(make_store: Callable[..., SnapshotStore], store: SnapshotStore) -> None:
    publish(store, 1)
    delta = publish(store, 2, applies_to={1})
    base = store.publish_base(Payload.of(b"\2" * 2500), delta)

    reader = make_store(k1=K1)
    assert reader.bases([delta]) == {("a", 2): base}
    assert reader.chain(delta) == (base,)
    assert reader.chain(delta, 1) == (delta,)
    assert make_store(k1=K2).list() == ()


def test_a_publication_without_the_lease_is_noted_in_the_store(
    client: redis.Redis, prefix: str, store: SnapshotStore, make_store: Callable[..., SnapshotStore]
) -> None:
    assert store.fenced() == (0, "")
    zombie = store.acquire("zombie", 60.0)
    client.delete(f"{prefix}lease")
    store.acquire("successor", 60.0)

    for _ in range(2):
        with pytest.raises(LeaseLost):
            publish(store, 1, fencing=zombie.number)

    tries, message = make_store().fenced()
    assert tries == 2
    assert message.startswith(f"a:1, published with the lease with number {zombie.number} at 2")
    client.set(f"{prefix}fenced", "junk")
    assert store.fenced() == (0, "")
    assert "fenced: 'junk', expected tries:" in str(store.damage.last)


def test_messages_and_logs_name_keys_by_their_ids_alone(
    client: redis.Redis, prefix: str, store: SnapshotStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    publish(store, 1)
    unknown = SnapshotStore(client, store._keys.namespace, signer=signer_of(store._keys.namespace, k2=K2))

    with pytest.raises(SnapshotError, match="signed with key k1, expected k2"):
        unknown.current()
    client.set(f"{prefix}current", b"a:1 5 k2:" + b"0" * 64)
    with pytest.raises(SnapshotError, match="the signature by key k2 is not of this pointer"):
        unknown.current()

    assert "signed with key k1" in caplog.text
    assert "one one" not in caplog.text
    assert "two two" not in caplog.text
