"""Two models side by side, over HTTP and from a real store: a split answers its share, a shadow is only measured."""

import hashlib
import re
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import httpx
import numpy as np
import pytest
import redis

from feature_store.payload import PayloadContent
from feature_store.signing import KeyPlace, Signer, SigningConfig
from feature_store.snapshots import SnapshotStore
from smes.arrays import F32, I64
from smes.schema import Schema
from smes_scorer.arms import user_point
from smes_scorer.config import ArmConfig, ScorerConfig
from smes_scorer.versions import Scorable
from tests.smes_scorer.conftest import VersionModel

Ready = Callable[..., AbstractContextManager[httpx.Client]]
Publish = Callable[..., object]
Until = Callable[[Callable[[], object]], None]
USERS = range(60)


@pytest.fixture
def other(client: redis.Redis, namespace: str) -> SnapshotStore:
    """Where another trainer publishes."""
    return SnapshotStore(client, f"{namespace}-b")


@pytest.fixture
def half(namespace: str) -> dict[str, Any]:
    """A split of the users in two."""
    return {"arms": {"b": ArmConfig(namespace=f"{namespace}-b", share=0.5)}}


@pytest.fixture
def shadow(namespace: str) -> dict[str, Any]:
    return {"arms": {"b": ArmConfig(namespace=f"{namespace}-b", shadow=True)}}


def ask(http: httpx.Client, user: int) -> dict[str, Any]:
    response = http.post("/v1/score", json={"user_id": user, "items": [13, 27]})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def arm_ready(http: httpx.Client, version: int | None = None) -> bool:
    arm = http.get("/health/ready").json()["arms"]["b"]
    return bool(arm["ready"]) and version in (None, arm["version"])


def metric(http: httpx.Client, name: str, **labels: str) -> float:
    """A value of ``/metrics``, 0 where it is not there."""
    text = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    found = re.search(rf"^smes_scorer_{name}{{{re.escape(text)}}} (\S+)$", http.get("/metrics").text, re.M)
    return float(found[1]) if found else 0.0


def naive_point(user: int, salt: str = "") -> float:
    digest = hashlib.blake2b(np.int64(user).tobytes(), digest_size=8, key=salt.encode()).digest()
    return int(np.frombuffer(digest, "<u8")[0]) / 2**64


def model_of(version: int, scores: Callable[[I64, F32], F32]) -> Callable[..., Scorable]:
    """A loader whose models score by their version; the one of ``version`` scores as given."""

    class Made(VersionModel):
        def score(self, ids: I64, numerics: F32, now_ms: I64 | int | None = None) -> F32:
            return scores(ids, numerics)

    def load(payloads: Iterable[PayloadContent], schema: Schema, before: Scorable | None) -> Scorable:
        *_, last = payloads
        loaded = int(last.dense["dense.version"])
        return Made(loaded) if loaded == version else VersionModel(loaded)

    return load


def test_a_split_answers_its_users_and_says_so(
    ready: Ready, store: SnapshotStore, other: SnapshotStore, publish: Publish, half: dict[str, Any], until: Until
) -> None:
    publish(store, 4)
    publish(other, 7, lineage="other")
    with ready(**half) as http:
        until(lambda: arm_ready(http))
        first, second = ([ask(http, user) for user in USERS] for _ in range(2))

        assert first == second  # a user keeps the arm
        assert {a["arm"] for a in first} == {"main", "b"}
        for user, answer in zip(USERS, first, strict=True):
            by_b = naive_point(user) < 0.5
            assert (answer["arm"], answer["lineage"], answer["version"]) == (
                ("b", "other", 7) if by_b else ("main", "a", 4)
            )
            assert [item["scores"]["like"] for item in answer["items"]] == [3.5 if by_b else 2.0] * 2
        answered = {arm: metric(http, "arm_answers_total", arm=arm) for arm in ("main", "b")}
        assert answered == {arm: 2 * sum(a["arm"] == arm for a in first) for arm in ("main", "b")}
        assert metric(http, "arm_served_version", arm="b") == 7
        assert http.get("/v1/stats").json()["arms"]["b"]["version"] == 7


def test_either_arm_swaps_alone(
    ready: Ready, store: SnapshotStore, other: SnapshotStore, publish: Publish, half: dict[str, Any], until: Until
) -> None:
    publish(store, 1)
    publish(other, 1)
    with ready(**half) as http:
        until(lambda: arm_ready(http))

        publish(other, 2)
        until(lambda: arm_ready(http, version=2))
        assert {(a["arm"], a["version"]) for a in (ask(http, user) for user in USERS)} == {("main", 1), ("b", 2)}

        publish(store, 3)
        until(lambda: http.get("/health/ready").json()["version"] == 3)
        assert {(a["arm"], a["version"]) for a in (ask(http, user) for user in USERS)} == {("main", 3), ("b", 2)}


def test_answers_are_of_one_version_while_both_arms_swap(
    ready: Ready, store: SnapshotStore, other: SnapshotStore, publish: Publish, half: dict[str, Any], until: Until
) -> None:
    publish(store, 1)
    publish(other, 1001)
    with ready(**half) as http:
        until(lambda: arm_ready(http))

        def publish_more() -> None:
            for version in range(2, 22):
                publish(store, version)
                publish(other, 1000 + version)

        publishing = threading.Thread(target=publish_more)
        publishing.start()
        answers = []
        while publishing.is_alive():
            answers += [ask(http, user) for user in USERS]
        publishing.join()

    for answer in answers:
        assert (answer["version"] > 1000) == (answer["arm"] == "b")
        assert {item["scores"]["like"] for item in answer["items"]} == {answer["version"] / 2}
    assert len({a["version"] for a in answers}) > 2


def test_an_arm_without_a_model_falls_back_to_the_main_arm(
    ready: Ready, store: SnapshotStore, other: SnapshotStore, publish: Publish, half: dict[str, Any], until: Until
) -> None:
    publish(store, 4)
    with ready(**half) as http:
        answers = [ask(http, user) for user in USERS]

        assert {(a["arm"], a["version"]) for a in answers} == {("main", 4)}
        of_b = sum(naive_point(user) < 0.5 for user in USERS)
        assert metric(http, "arm_fallbacks_total", arm="b", reason="not_ready") == of_b > 0
        health = http.get("/health/ready").json()
        assert health["status"] == "degraded"
        assert health["problems"]["arms.b"] == "no snapshot was published yet"

        publish(other, 7)
        until(lambda: arm_ready(http))
        assert {ask(http, user)["arm"] for user in USERS} == {"main", "b"}
        assert http.get("/health/ready").json()["status"] == "ready"


def test_an_arm_that_cannot_score_falls_back_to_the_main_arm(
    ready: Ready, store: SnapshotStore, other: SnapshotStore, publish: Publish, half: dict[str, Any], until: Until
) -> None:
    publish(store, 4)
    publish(other, 7)
    users: list[int] = []

    def breaks_for_users(ids: I64, numerics: F32) -> F32:
        if ids[0, 0] in USERS and ids[0, 0] != 0:  # not in the warm-up
            users.append(int(ids[0, 0]))
            if len(users) % 2:
                raise ArithmeticError("broken")
            return np.full((len(ids), 3), np.nan, np.float32)
        return np.zeros((len(ids), 3), np.float32)

    with ready(load=model_of(7, breaks_for_users), **half) as http:
        until(lambda: arm_ready(http))

        answers = [ask(http, user) for user in USERS if user != 0]

        assert {(a["arm"], a["version"]) for a in answers} == {("main", 4)}
        assert metric(http, "arm_fallbacks_total", arm="b", reason="failed") == len(users) > 1
        assert http.get("/v1/stats").json()["errors"] == 0


def test_a_snapshot_of_another_schema_is_refused_by_its_arm_alone(
    ready: Ready, store: SnapshotStore, other: SnapshotStore, publish: Publish, half: dict[str, Any], until: Until
) -> None:
    publish(store, 4)
    publish(other, 7, schema_hash="0123456789abcdef")
    with ready(**half) as http:
        until(lambda: "schema" in str(http.get("/health/ready").json()["problems"].get("arms.b")))

        assert http.get("/health/ready").json()["problems"]["snapshots"] is None
        assert {ask(http, user)["arm"] for user in USERS} == {"main"}
        assert metric(http, "arm_refusals_total", arm="b", reason="schema") == 1
        assert metric(http, "refusals_total", reason="schema") == 0


def test_a_shadow_changes_no_answer_and_is_measured(
    ready: Ready, store: SnapshotStore, other: SnapshotStore, publish: Publish, shadow: dict[str, Any], until: Until
) -> None:
    publish(store, 4)
    with ready() as http:
        alone = [ask(http, user) for user in USERS]
    publish(other, 5)
    with ready(max_shadow_waiting=len(USERS), **shadow) as http:
        until(lambda: arm_ready(http))

        assert [ask(http, user) for user in USERS] == alone

        def requests(outcome: str) -> float:
            return metric(http, "arm_shadow_requests_total", arm="b", outcome=outcome)

        until(lambda: requests("scored") == len(USERS))
        assert (requests("dropped"), requests("failed")) == (0, 0)
        items = 2 * len(USERS)
        # Its clicks are higher by 1, its likes by 0.5, and its third scores are the same.
        sizes = {
            task: [
                metric(http, "arm_score_difference_bucket", arm="b", task=task, le=le) for le in ("0.2", "0.5", "1.0")
            ]
            for task in ("click", "like", "watch_s")
        }
        assert sizes == {"click": [0, 0, items], "like": [0, items, items], "watch_s": [items] * 3}
        assert metric(http, "arm_score_shift", arm="b", task="like") == pytest.approx(0.5)
        assert metric(http, "arm_shadow_latency_seconds_count", arm="b") == len(USERS)


def test_a_shadow_that_hangs_delays_no_answer(
    ready: Ready, store: SnapshotStore, other: SnapshotStore, publish: Publish, shadow: dict[str, Any], until: Until
) -> None:
    publish(store, 4)
    publish(other, 5)
    going_on = threading.Event()

    def hangs(ids: I64, numerics: F32) -> F32:
        if ids[0, 0] == 1:
            assert going_on.wait(60)
        return np.zeros((len(ids), 3), np.float32)

    with ready(load=model_of(5, hangs), max_shadow_waiting=3, **shadow) as http:
        until(lambda: arm_ready(http))

        answers = [ask(http, 1) for _ in range(50)]  # the shadow has not scored one of them yet

        assert {(a["arm"], a["version"]) for a in answers} == {("main", 4)}
        # One is being scored or waits to be taken, three wait.
        assert metric(http, "arm_shadow_requests_total", arm="b", outcome="dropped") in (46, 47)
        going_on.set()
        until(lambda: metric(http, "arm_shadow_requests_total", arm="b", outcome="scored") >= 3)


def test_a_shadow_that_fails_is_counted(
    ready: Ready, store: SnapshotStore, other: SnapshotStore, publish: Publish, shadow: dict[str, Any], until: Until
) -> None:
    publish(store, 4)
    publish(other, 5)

    def fails(ids: I64, numerics: F32) -> F32:
        if ids[0, 0] == 1:
            raise ArithmeticError("broken")
        return np.full((len(ids), 3), np.nan if ids[0, 0] == 2 else 0, np.float32)

    with ready(load=model_of(5, fails), **shadow) as http:
        until(lambda: arm_ready(http))
        for user in (1, 2, 3):
            assert ask(http, user)["version"] == 4

        until(lambda: metric(http, "arm_shadow_requests_total", arm="b", outcome="scored") == 1)
        assert metric(http, "arm_shadow_requests_total", arm="b", outcome="failed") == 2


def test_a_candidate_that_is_held_back_is_served_by_its_arm_alone(
    ready: Ready, store: SnapshotStore, publish: Callable[..., Any], until: Until
) -> None:
    publish(store, 4)
    with ready(arms={"b": ArmConfig(held=True, share=0.5)}) as http:
        assert {ask(http, user)["arm"] for user in USERS} == {"main"}
        assert http.get("/health/ready").json()["status"] == "ready"  # that there is none is no problem

        publish(store, 5, held="worse than version 4")
        until(lambda: arm_ready(http, version=5))
        assert {(a["arm"], a["version"]) for a in (ask(http, user) for user in USERS)} == {("main", 4), ("b", 5)}

        store.operator.promote(5, lineage="a", why="better than it looks", by="test")
        until(lambda: http.get("/health/ready").json()["version"] == 5)
        until(lambda: not arm_ready(http))
        assert {(a["arm"], a["version"]) for a in (ask(http, user) for user in USERS)} == {("main", 5)}


def test_a_shadow_of_a_candidate_ends_with_it(
    ready: Ready, store: SnapshotStore, publish: Callable[..., Any], until: Until
) -> None:
    publish(store, 4)
    with ready(arms={"b": ArmConfig(held=True, shadow=True)}) as http:

        def requests(outcome: str) -> float:
            return metric(http, "arm_shadow_requests_total", arm="b", outcome=outcome)

        publish(store, 5, held="worse than version 4")
        until(lambda: arm_ready(http, version=5))
        ask(http, 1)
        until(lambda: requests("scored") == 1)

        store.operator.promote(5, lineage="a", why="better than it looks", by="test")
        until(lambda: not arm_ready(http))
        for user in USERS:
            ask(http, user)
        until(lambda: requests("not_ready") + requests("dropped") == len(USERS))
        assert requests("scored") == 1


def test_a_version_that_is_only_listed_as_held_is_no_candidate(
    ready: Ready, store: SnapshotStore, publish: Publish, client: redis.Redis, namespace: str, until: Until
) -> None:
    publish(store, 4)
    publish(store, 5)
    client.zadd(f"{{{namespace}}}:snapshots:held", {"a:4": 1.0})
    assert [manifest.version for manifest in store.held()] == [4]  # whoever can write to Redis can write the list
    with ready(arms={"b": ArmConfig(held=True, share=0.5)}) as http:
        publish(store, 6, held="worse")
        until(lambda: arm_ready(http, version=6))
        client.zrem(f"{{{namespace}}}:snapshots:held", "a:6")

        until(lambda: not arm_ready(http))
        assert {(a["arm"], a["version"]) for a in (ask(http, user) for user in USERS)} == {("main", 5)}


def test_signatures_are_verified_in_every_arm(
    ready: Ready,
    client: redis.Redis,
    namespace: str,
    publish: Publish,
    half: dict[str, Any],
    until: Until,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KEY_OF_A_TEST", "k" * 40)
    signing = SigningConfig((KeyPlace(id="k1", env="KEY_OF_A_TEST"),))
    publish(SnapshotStore(client, namespace, signer=Signer.of(signing, namespace)), 4)
    publish(SnapshotStore(client, f"{namespace}-b"), 7)  # not signed
    with ready(signing=signing, **half) as http:
        until(lambda: "unsigned" in str(http.get("/health/ready").json()["problems"].get("arms.b")))

        assert metric(http, "arm_refusals_total", arm="b", reason="signature") >= 1
        assert {ask(http, user)["arm"] for user in USERS} == {"main"}

        publish(SnapshotStore(client, f"{namespace}-b", signer=Signer.of(signing, f"{namespace}-b")), 8)
        until(lambda: arm_ready(http, version=8))


@pytest.mark.parametrize("user", [0, 1, -1, 2**62, -(2**63) + 1])
def test_a_users_place_is_blake2b_of_salt_and_id(user: int) -> None:
    assert user_point(user, b"") == pytest.approx(naive_point(user), abs=1e-15)
    assert user_point(user, b"salt") == pytest.approx(naive_point(user, "salt"), abs=1e-15)


def test_users_are_spread_evenly_and_anew_by_another_salt() -> None:
    points = np.array([[user_point(user, salt) for user in range(20_000)] for salt in (b"", b"x")])

    assert 0 <= points.min() < points.max() < 1
    shares = (points < 0.1).mean(axis=1)
    assert shares == pytest.approx([0.1, 0.1], abs=5 * (0.1 * 0.9 / 20_000) ** 0.5)
    assert abs(np.corrcoef(points)[0, 1]) < 5 / 20_000**0.5


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({"main": ArmConfig(held=True, shadow=True)}, "ScorerConfig.arms: 'main', expected the name of an arm"),
        ({"B": ArmConfig(held=True, shadow=True)}, "ScorerConfig.arms: 'B', expected the name of an arm"),
        (
            {"b": ArmConfig(namespace="x", share=0.6), "c": ArmConfig(namespace="y", share=0.6)},
            "ScorerConfig.arms: shares of 1.2 in all, expected at most 1",
        ),
    ],
)
def test_arms_are_checked(arms: dict[str, ArmConfig], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ScorerConfig(arms=arms)


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"share": 0.1}, "ArmConfig.namespace: None, expected either a namespace or held: true"),
        ({"namespace": "x", "held": True, "share": 0.1}, "expected either a namespace or held: true"),
        ({"namespace": "x"}, "ArmConfig.share: null, expected a share of the users, or shadow: true"),
        ({"namespace": "x", "share": 1.5}, "ArmConfig.share: 1.5, expected more than 0, at most 1"),
    ],
)
def test_an_arm_is_checked(arm: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ArmConfig(**arm)


def test_an_arm_of_the_scorers_own_namespace_is_refused(make_app: Callable[..., Any], namespace: str) -> None:
    with pytest.raises(ValueError, match="expected another trainer's"):
        make_app(arms={"b": ArmConfig(namespace=namespace, share=0.5)})
