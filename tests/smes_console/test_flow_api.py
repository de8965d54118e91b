"""What Flow and the head of the page say: the report's figures, what is away and since when, and quickly."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from feature_store.config import FeatureStoreConfig
from feature_store.snapshots import SnapshotStore
from smes.errors import SmesError
from smes_console.deployment import kept, letters_state, log_state
from smes_console.sources import Places, Reached, Sources
from smes_io.clock import wall_clock_ms
from smes_io.redis_client import connect
from smes_scorer.first_answers import STAGES
from stream.log.event_log import EventLog, OutRecord
from stream.log.open_log import EventLogConfig, open_event_log
from stream.topics import DEAD_LETTERS, FEEDBACK, IMPRESSIONS
from tests.running import until
from tests.smes_console.consoles import NOBODY, console, places_on
from tests.smes_scorer.made_payloads import version_payload
from tests.trainer.small_world import fill, make_trainer, train_to_the_end
from trainer.config import HttpConfig
from trainer.evaluation import ProgressiveEvaluation
from trainer.http import TrainerServer
from trainer.loop import Trainer
from trainer.recent_lines import RecentLines
from trainer.run_report import report_so_far, training_report
from trainer.stats import TrainerStats
from trainer.stretches import Stretches
from trainer.telemetry import Watch

AWAY_WITHIN_S = 3.0
"""A look takes two seconds at most."""


@pytest.fixture
def log(redis_url: str, namespace: str) -> Iterator[EventLog]:
    """An event log on Redis, with 1,500 impressions and their feedback."""
    with closing(open_event_log(EventLogConfig(redis_url=redis_url, namespace=namespace))) as log:
        for topic in (IMPRESSIONS, FEEDBACK):
            log.ensure_topic(topic, 2)
        fill(log, 1500)
        yield log


def publish(
    redis_url: str,
    namespace: str,
    *,
    age_s: float,
    positions: dict[str, dict[str, int]],
    lineage: str = "a",
    step: int = 70,
) -> None:
    """Publish version 7 of a lineage, and pin it."""
    with closing(connect(redis_url, 5.0)) as client:
        store = SnapshotStore(client, namespace)
        store.publish(
            version_payload(7, {"lineage": lineage, "version": "7", "schema_hash": "made"}),
            lineage=lineage,
            version=7,
            schema_hash="made",
            step=step,
            created_ms=wall_clock_ms() - round(1000 * age_s),
            positions=positions,
        )
        store.operator.pin(7, by="a test")


def trainer_on(log: EventLog) -> tuple[Trainer, Stretches]:
    made: list[Stretches] = []

    def over_time(evaluation: ProgressiveEvaluation) -> Stretches:
        made.append(Stretches(evaluation))
        return made[0]

    return make_trainer(log, None, over_time=over_time), made[0]


@contextmanager
def shown(trainer: Trainer, stretches: Stretches, port: int = 0) -> Iterator[TrainerServer]:
    """A trainer that answers at ``/v1/stats``; the loop that looks runs on another thread."""
    watch = Watch(trainer, stretches, report=lambda: report_so_far(trainer, seconds=1, trained=trainer.trained))
    server, stop = TrainerServer(HttpConfig(port=port)), threading.Event()

    def loop() -> None:
        while not stop.wait(0.02):
            watch.look_if_due()

    thread = threading.Thread(target=loop)
    server.start()
    server.show(CollectorRegistry(), dict, TrainerStats(watch, None, RecentLines(), trainer.lineage))
    thread.start()
    try:
        yield server
    finally:
        stop.set()
        thread.join()
        server.stop()


def flow_of(http: httpx.Client) -> dict[str, Any]:
    return dict(http.get("/api/flow").raise_for_status().json())


def alarms_of(http: httpx.Client) -> dict[str, list[str]]:
    """Source → what is said of it."""
    found: dict[str, list[str]] = {}
    for alarm in http.get("/api/header").raise_for_status().json()["alarms"]:
        found.setdefault(alarm["source"], []).append(alarm["text"])
    return found


def test_with_nothing_running_everything_is_said_to_be_away(tmp_path: Path) -> None:
    history = tmp_path / "history"
    with console(places_on("redis://127.0.0.1:1/0", "x", history=history), tmp_path) as http:
        started_s, began_ms = time.monotonic(), wall_clock_ms()
        flow = flow_of(http)
        assert time.monotonic() - started_s < AWAY_WITHIN_S
        for name, says in (("trainer", NOBODY), ("scorer", NOBODY), ("log", "127.0.0.1:1"), ("store", "127.0.0.1:1")):
            assert says in flow[name]["problem"], name
            assert began_ms <= flow[name]["since_ms"] <= wall_clock_ms()
        assert (flow["log"]["topics"], flow["trainer"]["report"], flow["trainer"]["ended"]) == (None, None, False)
        assert [each["stage"] for each in flow["stages"]] == list(STAGES)
        assert set(alarms_of(http)) == {"trainer", "scorer", "event log", "snapshots"}
        started_s = time.monotonic()
        again = flow_of(http)
        assert time.monotonic() - started_s < 1.0, "what is known to be away is not waited for"
        assert [again[name]["since_ms"] for name in ("trainer", "log")] == [
            flow[name]["since_ms"] for name in ("trainer", "log")
        ]
        # A run that has ended left its report in the folder of its history.
        history.mkdir()
        report = {"events": {"impressions": 5, "trained": 4, "waiting": 1}, "feedback": {"received": 2, "attached": 1}}
        (history / "report.json").write_text(json.dumps(report))
        until(lambda: flow_of(http)["trainer"]["ended"], "the report of the run that has ended", 20)
        ended = flow_of(http)["trainer"]
        assert (ended["report"]["events"], ended["problem"] is None) == (report["events"], False)
        assert ended["unaccounted"] == ["feedback: 2 received, but 1 attached = 1"]
        (history / "report.json").write_text('{"events": {}}')
        until(lambda: not flow_of(http)["trainer"]["ended"], "a file that is no report is not shown", 20)


def test_what_is_shown_of_a_trainer_is_its_report(
    redis_url: str, namespace: str, log: EventLog, tmp_path: Path
) -> None:
    trainer, stretches = trainer_on(log)
    while trainer.stream.ledger().impressions < 1500:
        trainer.stream.poll(0.1)
    train_to_the_end(trainer)
    report = training_report(trainer, seconds=1, trained=trainer.trained).to_dict()
    assert report["events"]["trained"] > 300
    with (
        shown(trainer, stretches) as server,
        console(places_on(redis_url, namespace, trainer_url=f"http://127.0.0.1:{server.port}"), tmp_path) as http,
    ):
        until(lambda: flow_of(http)["trainer"].get("report"), "the report")
        flow = flow_of(http)
        assert (flow["trainer"]["problem"], flow["trainer"]["ended"], flow["trainer"]["unaccounted"]) == (
            None,
            False,
            [],
        )
        for section, figures in flow["trainer"]["report"].items():
            assert figures == report[section], section
        assert flow["trainer"]["step"] == report["version"]
        assert flow["trainer"]["positions"] == trainer.stream.positions_by_topic()
        assert flow["log"]["unread"] == {IMPRESSIONS: 0, FEEDBACK: 0}
        log.append(FEEDBACK, [OutRecord(b"{}", (("codec", b"json"),), 1)] * 3)
        until(lambda: flow_of(http)["log"]["unread"] == {IMPRESSIONS: 0, FEEDBACK: 3}, "three more records")
        ends = flow_of(http)["log"]["topics"][FEEDBACK]["end"]
        assert sum(ends.values()) == report["feedback"]["received"] + 3
        assert set(alarms_of(http)) == {"scorer", "trainer", "snapshots"}, "no lease, and no version"
        # An old version: three records are unread by the trainer, and then none, though no cut was made of them.
        lineage, step = trainer.lineage, report["version"]
        publish(redis_url, namespace, age_s=100, positions={FEEDBACK: {"0": 0}}, lineage=lineage, step=step)
        until(lambda: "3 records are unread" in str(alarms_of(http).get("snapshots")), "what the trainer has not read")
        trainer.stream.poll(0.1)
        until(lambda: "snapshots" not in alarms_of(http), "everything was read: nothing could be newer")


def test_without_a_trainer_the_newest_version_says_what_was_read(
    redis_url: str, namespace: str, log: EventLog, tmp_path: Path
) -> None:
    with console(places_on(redis_url, namespace, trainer_url=None), tmp_path) as http:
        assert flow_of(http)["log"]["unread"] is None
        assert alarms_of(http)["snapshots"] == ["none was published yet"]
        publish(redis_url, namespace, age_s=100, positions={IMPRESSIONS: {"0": 100, "1": 10_000}, FEEDBACK: {"0": 0}})
        until(lambda: flow_of(http)["store"]["current"], "the version is seen")
        flow = flow_of(http)
        ends = {topic: {p.partition: end for p, end in log.end(topic).items()} for topic in (IMPRESSIONS, FEEDBACK)}
        beyond = {IMPRESSIONS: ends[IMPRESSIONS][0] - 100, FEEDBACK: sum(ends[FEEDBACK].values())}
        assert flow["log"]["unread"] == beyond
        assert (flow["store"]["current"]["version"], flow["store"]["pinned"], flow["store"]["held"]) == (7, True, 0)
        head = http.get("/api/header").json()
        assert {name: head["in_service"][name] for name in ("source", "lineage", "version")} == {
            "source": "snapshots",
            "lineage": "a",
            "version": 7,
        }
        assert 100_000 <= head["in_service"]["age_ms"] < 160_000
        [old] = alarms_of(http)["snapshots"]
        assert f"{sum(beyond.values()):,} records are unread, expected at most 60 s" in old


def test_a_place_that_hangs_is_away_until_it_answers(
    redis_url: str, namespace: str, log: EventLog, tmp_path: Path
) -> None:
    trainer, stretches = trainer_on(log)
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:  # accepts, and never answers
        port = silent.getsockname()[1]
        places = places_on(redis_url, namespace, trainer_url=f"http://127.0.0.1:{port}")
        with console(places, tmp_path) as http, ThreadPoolExecutor(20) as browsers:
            started_s = time.monotonic()
            flows = list(browsers.map(lambda _: flow_of(http), range(20)))
            assert time.monotonic() - started_s < AWAY_WITHIN_S
            assert {flow["trainer"]["problem"] is None for flow in flows} == {False}
            assert {flow["log"]["problem"] for flow in flows} == {None}, "the rest is shown"
            started_s = time.monotonic()
            list(browsers.map(lambda _: flow_of(http), range(20)))
            assert time.monotonic() - started_s < 1.5
            silent.close()
            with shown(trainer, stretches, port):
                until(lambda: flow_of(http)["trainer"]["problem"] is None, "the trainer is back")
                assert flow_of(http)["trainer"]["since_ms"] is None
            until(lambda: flow_of(http)["trainer"]["problem"], "the trainer is away again")


@pytest.fixture
def sources(redis_url: str, namespace: str) -> Iterator[Callable[..., Sources]]:
    made: list[Sources] = []

    def make(places: Places | None = None, **options: Any) -> Sources:
        made.append(Sources(places or places_on(redis_url, namespace), **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_however_many_ask_a_place_is_asked_once_a_second(sources: Callable[..., Sources]) -> None:
    now_s = [0.0]
    looks, asked, may_end = sources(monotonic=lambda: now_s[0]), [], threading.Event()

    def place() -> int:
        asked.append(now_s[0])
        may_end.wait(10)
        return len(asked)

    def look(_: int = 0) -> Reached[int]:
        found: Reached[int] = looks.look("place", place)
        return found

    with ThreadPoolExecutor(20) as browsers:
        waiting = [browsers.submit(look) for _ in range(20)]
        until(lambda: asked, "the first asks")
        may_end.set()
        assert {each.result().value for each in waiting} == {1}
        now_s[0] = 0.9
        assert look().value == 1
        now_s[0] = 1.1
        assert {each.value for each in browsers.map(look, range(20))} == {2}
        looks.forget("place")
        assert look().value == 3


@pytest.mark.kafka
def test_on_kafka_letters_that_nobody_has_written_yet_keep_nobody_waiting(
    kafka_bootstrap: str, namespace: str, sources: Callable[..., Sources]
) -> None:
    now_s = [0.0]
    config = EventLogConfig(kind="kafka", kafka_bootstrap=kafka_bootstrap, namespace=namespace)
    looks = sources(Places(config, FeatureStoreConfig()), monotonic=lambda: now_s[0])
    with closing(open_event_log(config)) as log:
        for topic in (IMPRESSIONS, FEEDBACK):
            log.ensure_topic(topic, 2)
        assert kept(letters_state(looks).value or {"begin": {}, "end": {}}) == 0, (
            "the one that asks first waits for the answer"
        )
        for records in (1, 2):
            log.append(FEEDBACK, [OutRecord(b"{}", (), 1)])
            now_s[0] += 11
            started_s = time.monotonic()
            assert kept(letters_state(looks).value or {"begin": {}, "end": {}}) == 0
            found = log_state(looks).value
            assert found is not None
            assert found[FEEDBACK] == {"begin": {"0": 0, "1": 0}, "end": {"0": 0, "1": records}}
            assert time.monotonic() - started_s < 1.4, "as long as Kafka takes to say that there is no topic"
        log.ensure_topic(DEAD_LETTERS, 1)
        log.append(DEAD_LETTERS, [OutRecord(b"{}", (), 0)])

        def seen() -> bool:
            now_s[0] += 11
            return kept(letters_state(looks).value or {"begin": {}, "end": {}}) == 1

        until(seen, "the letter is counted", 20)


def test_whatever_goes_wrong_becomes_a_problem_in_words(sources: Callable[..., Sources]) -> None:
    looks = sources()
    for number, (error, says) in enumerate(
        (
            (SmesError("redis://app:pa55word@host:1: no answer"), "redis://app:***@host:1: no answer"),
            (ConnectionResetError("gone"), "gone"),
            (KeyError("of a programmer"), "place 2: KeyError: 'of a programmer'"),
        )
    ):

        def fail(error: Exception = error) -> None:
            raise error

        found = looks.look(f"place {number}", fail)
        assert (found.value, found.problem) == (None, says)
    many = [looks.look(f"name {n}", lambda: 1).value for n in range(1000)]
    assert set(many) == {1}
    assert len(looks._looks) < 300, "names that browsers make up are forgotten"
