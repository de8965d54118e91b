"""Scores through a real service that is away, not ready, wants a token or refuses; and features into a real store."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI

from feature_store.entities import EntityStore
from feature_store.manifest import Manifest
from feature_store.snapshots import SnapshotStore
from smes.errors import FeatureStoreUnavailable
from smes.hashing import encode_id
from smes_client import Answer, Features, Scorer, ScorerRefused, ScorerUnavailable, load_schema
from smes_io.redis_client import open_client
from smes_io.schema_file import builtin_path, load_schema_file
from smes_io.secrets import SecretPlace
from tests.smes_scorer.conftest import SCHEMA
from tests.smes_scorer.conftest import client as client
from tests.smes_scorer.conftest import listening as listening
from tests.smes_scorer.conftest import make_app as make_app
from tests.smes_scorer.conftest import publish as publish
from tests.smes_scorer.conftest import store as store

Listening = Callable[[FastAPI], AbstractContextManager[str]]
CONTEXT = {"hour": "noon", "tags": ["a", 4, 5], "battery": np.float32(0.5), "seen": [1, 2], "outcomes": (3, 0)}


@pytest.fixture
def serving(make_app: Callable[..., FastAPI], listening: Listening) -> Callable[..., AbstractContextManager[str]]:
    @contextmanager
    def serving(**config: Any) -> Iterator[str]:
        with listening(make_app(**config)) as url:
            yield url

    return serving


def check(answer: Answer, version: int) -> None:
    assert (answer.arm, answer.version, [item.item_id for item in answer.items]) == ("main", version, ["b", 13])
    assert list(answer.items[0].scores) == ["click", "like", "watch_s"]
    expected = [version + encode_id("b") % 10 / 16, version + 3 / 16]
    assert [item.scores["click"] for item in answer.items] == pytest.approx(expected)
    assert answer.ranking == (["b", 13] if expected[0] >= expected[1] else [13, "b"])
    best = answer.served(0)
    assert best == {"arm": "main", "version": version, "scores": dict(_item(answer, answer.ranking[0]).scores)}


def _item(answer: Answer, item_id: int | str) -> Any:
    return next(item for item in answer.items if item.item_id == item_id)


def test_a_caller_waits_for_a_service_that_is_not_ready_with_and_without_asyncio(
    serving: Callable[..., AbstractContextManager[str]],
    store: SnapshotStore,
    publish: Callable[..., Manifest],
) -> None:
    with serving() as url, Scorer(url, SCHEMA, deadline_s=60, timeout_s=30) as scorer:
        in_vain = r"no answer within 1 s, in [1-9] tries; the last: .*503: .*not ready"
        with Scorer(url, SCHEMA, deadline_s=1) as short, pytest.raises(ScorerUnavailable, match=in_vain):
            short.score(7, [1])
        threading.Timer(0.2, publish, (store, 1)).start()
        check(scorer.score("ann", ["b", 13], CONTEXT), 1)
        items: list[int | str] = [12, "b", 13, 13, 19]
        whole = scorer.score("ann", items)
        some = scorer.score("ann", items, top_k=4, tasks=["like", "click"])
        assert some.ranking == whole.ranking[:4]
        assert sorted(map(str, some.ranking)) == sorted(map(str, (item.item_id for item in some.items)))
        assert [item.item_id for item in some.items] == [i for i in items if i in some.ranking]
        assert some.served(0)["scores"] == {n: whole.served(0)["scores"][n] for n in ("like", "click")}

        async def both() -> None:
            async with scorer:
                answers = await asyncio.gather(*(scorer.ascore("ann", ["b", 13], CONTEXT) for _ in range(3)))
            for answer in answers:
                check(answer, 1)

        asyncio.run(both())


def test_nobody_at_the_address_is_said_within_the_deadline() -> None:
    started_s = time.monotonic()
    scorer = Scorer("http://127.0.0.1:1", SCHEMA, deadline_s=0.2)

    with pytest.raises(ScorerUnavailable, match=r"127\.0\.0\.1:1/v1/score: no answer within 0\.2 s, .*Connect"):
        scorer.score(1, [1])
    with pytest.raises(ScorerUnavailable, match="ConnectError"):
        asyncio.run(scorer.ascore(1, [1]))
    assert time.monotonic() - started_s < 30


def test_what_trying_again_does_not_mend_is_raised_at_once(
    serving: Callable[..., AbstractContextManager[str]], tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("a-token-of-the-tests\n")
    with serving(tokens=SecretPlace(tokens), max_items=2) as url:
        with Scorer(url, SCHEMA) as stranger, pytest.raises(ScorerRefused, match="401"):
            stranger.score(1, [1])
        with (
            Scorer(url, SCHEMA, token="a-token-of-the-tests", timeout_s=30) as scorer,
            pytest.raises(ValueError, match="items: 3 items, expected at most 2"),
        ):
            scorer.score(1, [1, 2, 3])


@pytest.mark.parametrize(
    ("named", "field"),
    [({"top_k": 0}, "top_k"), ({"top_k": True}, "top_k"), ({"tasks": []}, "tasks"), ({"tasks": "click"}, "tasks")]
    + [({"tasks": ["like", name]}, r"tasks\.1") for name in ("like", "share", ["click"])]
    + [({"tasks": wrong}, "tasks") for wrong in ({"click"}, 5)],
)
def test_a_wrong_choice_is_not_sent(named: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        Scorer("http://127.0.0.1:1", SCHEMA).score(1, [1], **named)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ((None, [1]), "user"),
        ((1, []), "items"),
        ((1, "123"), "items"),
        (("", [1]), "user"),
        ((1, [1, True]), r"items\.1"),
        ((1, [1], {"hours": 1}), r"context\.hours"),
        ((1, [1], {"age": 1}), r"context\.age"),  # the store has it
        ((1, [1], {"battery": "full"}), r"context\.battery"),
        ((1, [1], {"seen": [1], "outcomes": [1, 2]}), r"context\.outcomes"),
    ],
)
def test_a_wrong_request_is_not_sent(arguments: tuple[Any, ...], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        Scorer("http://127.0.0.1:1", SCHEMA).score(*arguments)


def test_features_single_and_many_as_the_scorer_reads_them(redis_url: str, namespace: str) -> None:
    with Features(SCHEMA, redis_url, namespace=namespace) as features:
        assert features.put_user("ann", {"age": 31})
        assert features.put_users((f"u{n}", {"age": n}) for n in range(1500)) == 0
        assert features.put_item("b", {"author": "joe", "days_out": 86_400}, time_ms=0)
        features.put_items([("b", {"author": "sue"}), (13, {"author": 4})])
        for wrong, field in (({"age": "old"}, "age"), ({"height": 1}, "height"), ({"age": float("inf")}, "age")):
            with pytest.raises(ValueError, match=rf"^{field}: "):
                features.put_user("ann", wrong)
        with pytest.raises(ValueError, match="user_id"):
            features.put_user(None, {"age": 1})  # type: ignore[arg-type]
    client = open_client(redis_url, 30)
    entities = EntityStore(client, SCHEMA, namespace)
    rows = entities.get(encode_id("ann"), np.array([encode_id("b"), 13]))
    other = entities.get(encode_id("u1499"), np.array([13]))
    before = entities.get(encode_id("ann"), np.array([encode_id("b")]), now_ms=946_684_800_000)
    client.close()
    assert rows.numerics[:, 0].tolist() == [31, 31]
    assert rows.ids[:, 2].tolist() == [encode_id("sue"), 4]
    assert other.numerics[0, 0] == 1499
    assert before.ids[0, 2] == encode_id("joe")


def test_an_absent_store_is_an_error_in_time() -> None:
    with pytest.raises(FeatureStoreUnavailable):
        Features(SCHEMA, "redis://127.0.0.1:1/0", timeout_s=0.1).put_user(1, {"age": 1})


SHOP = """
name: shop
tasks: [{name: open, window_s: 5}, {name: stars, kind: regression, max_value: 5}]
features:
  - {name: price, kind: numeric, transform: log1p, source: item}
  - {name: recent, kind: sequence, max_length: 4, vocabulary: item_id, query: item_id}
  - {name: outcomes, kind: sequence, max_length: 4, accompanies: recent}
history: {items: recent, outcomes: outcomes, tasks: [open]}
derive:
  - {name: hour, kind: hour_of_day, time_zone: Europe/Berlin}
  - {name: band, kind: bucket, of: price, boundaries: [1, 2.5, 10]}
  - {name: mix, kind: cross, of: [user_id, band], into: 1000}
"""


def test_a_schema_file_is_the_same_schema_to_the_client(tmp_path: Path) -> None:
    shop = tmp_path / "shop.yaml"
    shop.write_text(SHOP)
    for path in (shop, Path(str(builtin_path("kuairand"))), Path(str(builtin_path("synthetic")))):
        assert load_schema(path) == load_schema_file(path).schema
        assert load_schema(path).hash == load_schema_file(path).schema.hash


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("name: shop", "nom: shop"), "nom: an unknown key"),
        (("window_s: 5", "widow_s: 5"), r"tasks\.0\.widow_s: an unknown key, expected one of name, kind"),
        (("window_s: 5", "window_s: soon"), r"tasks\.0: Expected `float`"),
        (("kind: numeric", "kind: number"), r"features\.0: .*number"),
        (("tasks: [", "tasks: {"), "expected YAML"),
    ],
)
def test_a_wrong_schema_file_names_the_place(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    file = tmp_path / "shop.yaml"
    file.write_text(SHOP.replace(*change, 1))
    with pytest.raises(ValueError, match=rf"shop\.yaml: .*{message}"):
        load_schema(file)
    with pytest.raises(ValueError, match=r"absent\.yaml: expected a readable schema file"):
        load_schema(tmp_path / "absent.yaml")
