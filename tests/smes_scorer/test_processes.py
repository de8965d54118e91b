"""Several processes serve from the memory of one that loads: each answer is of one version, whoever ends meanwhile."""

import json
import math
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import redis
from prometheus_client.parser import text_string_to_metric_families

from feature_store.config import ChunksConfig
from feature_store.snapshots import SnapshotStore, SnapshotWatcher
from smes.arrays import F32, I64
from smes.errors import SmesError
from smes.model.serving import ServingModel
from smes.model.shared_rows import SharedTable
from smes.schema import MISSING
from smes.shared_memory import Bytes, SharedBytes, mapped
from smes_scorer.config import ScorerConfig
from smes_scorer.first_answers import STAGES, FirstAnswer, FirstAnswers
from smes_scorer.hot_swap import HotSwap
from smes_scorer.loading import load_table_model
from smes_scorer.processes.board import Board
from smes_scorer.processes.feed import Feed
from smes_scorer.processes.figures import Figures
from smes_scorer.processes.follower import Follower, Following, WorkerPlace
from smes_scorer.processes.mailbox import Mailbox
from smes_scorer.processes.supervisor import Supervisor, serve_by_processes
from smes_scorer.telemetry import Telemetry
from tests.smes_scorer.chains import MODEL, SCHEMA, Chain

_ROOT = Path(__file__).parents[2]
Until = Callable[[Callable[[], object]], None]


class Service:
    """A loader and its workers in this process, which take a turn when they are told to."""

    def __init__(self, client: redis.Redis, namespace: str, workers: int = 2) -> None:
        self.board = Board(workers)
        self.boxes, self.loader_box = [Mailbox() for _ in range(workers)], Mailbox()
        self._client, self._namespace = client, namespace
        self.loader_starts()
        self.followers: list[Follower] = []
        self._following: list[Following] = []
        for worker in range(workers):
            self.board.born(worker)
            follower, following = self._worker(worker)
            self.followers.append(follower)
            self._following.append(following)

    def loader_starts(self) -> None:
        """A loader that knows nothing takes the place of the one before."""
        incarnation = self.board.born(-1)
        self.feed = Feed(0, self.board, self.boxes, incarnation, lambda schema_hash: {})
        self.swap = HotSwap(
            SnapshotStore(self._client, self._namespace),
            SnapshotWatcher(self._client, self._namespace),
            SCHEMA,
            lambda payloads, schema, before: load_table_model(payloads, schema, before, new_table=SharedTable),
            FirstAnswers(),
            Telemetry(),
            poll_s=0.1,
            versions=self.feed,
        )

    def worker_starts(self, worker: int) -> None:
        """A worker that knows nothing takes the place of the one before, whose memory is gone."""
        self.board.died(worker)
        self.board.born(worker)
        self.followers[worker], self._following[worker] = self._worker(worker)

    def turn(self, *workers: int) -> None:
        """The loader looks at the store, and some workers, by default all, at their boxes."""
        self.swap.refresh()
        self.feed.catch_up()
        for worker in workers or range(self.board.workers):
            self._following[worker].turn(0)

    def followed_turn(self, worker: int, *, borrow: bool = False) -> None:
        """A worker looks into its box, and before that asks the others for what they have, as at its start."""
        if borrow:
            self._following[worker].borrow()
        self._following[worker].turn(0)

    def _worker(self, worker: int) -> tuple[Follower, Following]:
        place = WorkerPlace(worker, self.board.incarnation(worker), self.board, self.boxes, self.loader_box)
        follower = Follower(0, SCHEMA, Telemetry())
        return follower, Following(place, [follower], lambda: b"{}")


def served_version(follower: Follower, chain: Chain) -> int:
    """The version in service, whose scores are bit for bit those of its weights."""
    with follower.reading() as served:
        chain.assert_scores(served.model, served.manifest.version)
        return served.manifest.version


def test_nothing_that_any_process_reads_is_folded(client: redis.Redis, namespace: str, store: SnapshotStore) -> None:
    service, chain = Service(client, namespace), Chain(store)
    slow, quick = service.followers
    chain.publish("full")
    service.turn()
    with slow.reading() as old:
        for _ in range(10):  # more than there are shadows, so that some are merged
            chain.publish()
            service.turn()
            service.turn()
            assert [served_version(follower, chain) for follower in (slow, quick)] == [chain.version] * 2
            chain.assert_scores(old.model, 1)
        assert service.swap.shadows > 0, "a request in another process still reads version 1"
    del old
    for _ in range(3):
        service.turn()
    assert service.swap.shadows == 0, "no request reads an older version, so the table has all changes"
    assert served_version(slow, chain) == chain.version
    # The rows are mapped, not copied: and nobody but the loader can write to them.
    with quick.reading() as served:
        assert not served.model.rows.table._words().flags.writeable  # type: ignore[attr-defined]


def test_a_process_that_takes_anothers_place_begins_anew(
    client: redis.Redis, namespace: str, store: SnapshotStore
) -> None:
    service, chain = Service(client, namespace), Chain(store)
    chain.publish("full")
    service.turn()
    for _ in range(3):
        chain.publish()
        service.turn(0)  # worker 1 does not look into its box
    assert service.swap.shadows == 3, "worker 1 still has version 1"

    service.worker_starts(1)
    service.turn(0)  # what was said to the one before is in the box; nothing is to be read of it
    service.turn()
    service.turn()
    assert service.swap.shadows == 0
    assert served_version(service.followers[1], chain) == chain.version

    service.board.died(-1)
    service.worker_starts(0)
    service.followed_turn(0, borrow=True)
    service.followed_turn(1)
    service.followed_turn(0)
    assert served_version(service.followers[0], chain) == chain.version, "lent by worker 1, while nobody loads"

    service.loader_starts()
    assert [served_version(follower, chain) for follower in service.followers] == [chain.version] * 2
    chain.publish()
    service.turn(0)
    chain.publish()
    service.turn(0)
    assert service.swap.shadows > 0, "worker 1 has not taken anything of this loader"
    assert served_version(service.followers[1], chain) < chain.version
    for _ in range(3):
        service.turn()
    assert service.swap.shadows == 0
    assert [served_version(follower, chain) for follower in service.followers] == [chain.version] * 2


def test_a_version_that_could_not_be_taken_is_told_again(
    client: redis.Redis, namespace: str, store: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, chain, refusals = Service(client, namespace), Chain(store), [MemoryError("no room")]

    def refused_once(descriptor: int, size: int) -> Bytes:
        if refusals:
            raise refusals.pop()
        return mapped(descriptor, size)

    monkeypatch.setattr("smes_scorer.processes.follower.mapped", refused_once)
    chain.publish("full")
    service.turn()
    assert service.followers[0].served is None
    assert "no room" in str(service.followers[0].problem)
    monkeypatch.setattr("smes_scorer.processes.feed._AGAIN_S", 0.0)
    service.turn()
    assert [served_version(follower, chain) for follower in service.followers] == [chain.version] * 2
    assert service.followers[0].problem is None


def test_memory_of_another_process_can_only_be_read() -> None:
    memory = SharedBytes(100_000)
    memory.array[5] = 7
    theirs = mapped(memory.descriptor, memory.size)
    memory.array[6] = 8

    assert theirs[5:7].tolist() == [7, 8]
    with pytest.raises(ValueError, match="read-only"):
        theirs[5] = 1
    with pytest.raises(PermissionError):
        mmap.mmap(memory.descriptor, memory.size)
    with pytest.raises(PermissionError):
        os.ftruncate(memory.descriptor, 10)


def test_the_figures_of_two_processes_are_those_of_one_that_did_the_work_of_both() -> None:
    rng, (one, first, second) = np.random.default_rng(0), (Telemetry() for _ in range(3))
    for number in range(200):
        status, latency_s = (200, 200, 422, 500)[number % 4], float(rng.gamma(2.0, 0.02))
        for telemetry in (one, first if number % 3 else second):
            telemetry.request(status, latency_s)
            telemetry.unknown_items.inc(number)
    answer = FirstAnswer(np.array([3]), np.array([700]), np.full((1, len(STAGES)), 100))
    for telemetry in (one, second):
        telemetry.unscored("busy")
        telemetry.first_answer(answer)
    together = Telemetry()
    first.skew_size.labels("price", "mean").set(math.inf)  # trained on one value alone
    for telemetry in (first, second):
        figures = Figures.from_bytes(Figures.of(telemetry, 0).to_bytes())
        together.add_state(figures.state)
        values = [value for *_, samples in figures.families for name, _, value in samples if name.endswith("skew_size")]
        assert values == ([math.inf] if telemetry is first else [])

    for name, figure in one.summary().items():
        if name not in ("rates", "recent_latency_ms"):  # of whole seconds, the newest left out
            assert together.summary()[name] == figure, name


_SERVE = """
import json, sys
from smes_scorer.config import ScorerConfig
from smes_scorer.processes.supervisor import serve_by_processes
from smes.schema import Schema
schema = Schema.from_dict(json.loads(sys.argv[1]))
config = ScorerConfig(port=0, poll_s=0.05, entity_timeout_ms=60_000, processes=2)
serve_by_processes(config, schema, redis_url=sys.argv[2], namespace=sys.argv[3],
                   on_listening=lambda url: print(url, flush=True))
"""


@contextmanager
def serving(*arguments: str, **environment: str) -> Iterator[tuple[psutil.Process, str]]:
    """(process, URL) of a service of two workers, none of whose processes is left at the end."""
    command, env = [sys.executable, "-P", *arguments], {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        url = next(line.split()[-1] for line in process.stdout if "http://" in line)
        one = psutil.Process(process.pid)
        children = one.children()
        assert len(children) == 3
        try:
            yield one, url
        finally:
            process.kill()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


ITEMS = list(range(0, 400, 7))
CALLERS = 3


def ids_of(user: int) -> I64:
    ids = np.full((len(ITEMS), SCHEMA.id_width), MISSING)
    ids[:, 0], ids[:, 1] = user, ITEMS
    return ids


@pytest.mark.timeout(300)
def test_swaps_and_kills_under_load(
    client: redis.Redis, redis_url: str, namespace: str, store: SnapshotStore, until: Until
) -> None:
    chain, expected, ended = Chain(store), dict[int, F32](), threading.Event()
    numerics = np.zeros((len(ITEMS), 0), np.float32)

    def publish(kind: str = "delta") -> None:
        chain.train()
        model = ServingModel.from_state(SCHEMA, MODEL, chain.learner.serving_state())
        expected[chain.learner.step_number] = np.stack([model.score(ids_of(user), numerics) for user in range(CALLERS)])
        chain.publish(kind, train=False, feedback_arrivals=[(1_700_000_000_000, 1, 0, 0, 0)])

    def ask(user: int, url: str) -> tuple[set[int], int]:
        """On ever new connections, so that every process is asked; the versions, and how many had no answer."""
        versions, cut = set[int](), 0
        while not ended.is_set():
            try:
                answer = httpx.post(f"{url}/v1/score", json={"user_id": user, "items": ITEMS}, timeout=60)
            except httpx.TransportError:  # its process was killed
                cut += 1
                continue
            assert answer.status_code == 200, answer.text
            body = answer.json()
            scores = np.array([list(item["scores"].values()) for item in body["items"]], np.float32)
            np.testing.assert_allclose(scores, expected[body["version"]][user], rtol=0, atol=1e-6)
            versions.add(body["version"])
        return versions, cut

    def serves(url: str) -> Callable[[], bool]:
        def served() -> bool:
            health = httpx.get(f"{url}/health/ready", timeout=60).json()
            return health["version"] == chain.version and not any(health["problems"].values())

        return served

    publish("full")
    arguments = ("-c", _SERVE, json.dumps(SCHEMA.to_dict()), redis_url, namespace)
    with serving(*arguments) as (process, url), ThreadPoolExecutor(CALLERS) as pool:
        until(serves(url))
        loader, *workers = sorted(process.children(), key=lambda child: child.pid)
        callers = [pool.submit(ask, user, url) for user in range(CALLERS)]
        try:
            for number in range(8):
                publish()
                if number in (2, 5):
                    {2: loader, 5: workers[0]}[number].kill()
                for _ in range(4):
                    until(serves(url))
        finally:
            ended.set()
        answered = [caller.result() for caller in callers]
        assert max(max(versions) for versions, _ in answered) == chain.version
        assert sum(cut for _, cut in answered) <= CALLERS, "only what the killed process was answering is lost"
        assert {child.pid for child in process.children()}.isdisjoint({loader.pid, workers[0].pid})

        samples = {
            (sample.name, sample.labels.get("worker")): sample.value
            for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
            for sample in family.samples
        }
        stats = httpx.get(f"{url}/v1/stats").json()
        assert samples["smes_scorer_process_restarts_total", None] == 2
        assert samples["smes_scorer_served_version", "0"] == samples["smes_scorer_served_version", "1"] == chain.version
        assert samples["smes_scorer_swaps_total", "loader"] >= 1
        assert ("smes_scorer_swaps_total", "0") not in samples
        assert samples["smes_scorer_latency_seconds_count", "1"] > 0
        assert stats["processes"] == {"alive": 2, "restarts": 2}
        assert stats["requests"] > samples["smes_scorer_latency_seconds_count", "1"], "of both workers"
        assert stats["freshness_ms"]["count"] <= len(expected), "a version's first answer is one, whoever gives it"
        assert stats["versions_answered"] == samples["smes_scorer_versions_answered_total", "loader"] >= 1

        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_what_was_killed_leaves_no_process_and_its_port_was_its_own(redis_url: str) -> None:
    arguments = ("-m", "smes_cli", "serve", "--schema", "synthetic", "--workers", "2", "--port", "0")
    with serving(*arguments, SMES_FEATURE_STORE__REDIS_URL=redis_url) as (process, url):
        assert httpx.get(f"{url}/health/ready", timeout=60).status_code == 503
        port = int(url.rsplit(":", 1)[1])
        with pytest.raises(SmesError, match=f"scorer: cannot listen on 127.0.0.1:{port}: Address already in use"):
            serve_by_processes(ScorerConfig(port=port, processes=2), SCHEMA, redis_url=redis_url)
        process.kill()


def test_an_object_store_that_cannot_be_opened_is_refused_before_processes_begin(redis_url: str) -> None:
    chunks = ChunksConfig("nope://bucket/folder")
    with pytest.raises(ValueError, match="url 'nope://bucket/folder': Protocol not known: nope"):
        serve_by_processes(ScorerConfig(port=0, processes=2), SCHEMA, redis_url=redis_url, chunks=chunks)


def test_a_stop_right_after_the_start_reaches_every_process() -> None:
    def stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def sleep() -> int:
        time.sleep(60)
        return 0

    began_s = time.monotonic()
    for _ in range(8):
        Supervisor(dict.fromkeys(range(3), sleep), Board(3), shutdown_s=30.0).run(on_started=stop)
    assert time.monotonic() - began_s < 30
