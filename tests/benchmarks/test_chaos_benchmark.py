"""Chaos, short: real servers and processes fail in turn, and what is left is what an undisturbed run leaves.

``make soak`` runs more of it. Also shown: what counts as an error of a scorer, that a digest sees every number, what a
moved clock and a full disk do, and which figures do not hold.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.chaos import holds, parsed, summary
from benchmarks.chaos_client import Caller
from benchmarks.chaos_faults import Clock, Disk, Fault, make_disk, plan, seconds_of
from benchmarks.chaos_kills import Replayed, run_kills
from benchmarks.chaos_malformed import run_malformed
from benchmarks.chaos_outages import run_outages
from benchmarks.chaos_rollback import run_rollback
from benchmarks.chaos_soak import growth, run_soak
from benchmarks.chaos_system import EventLogKind, System, checkpoint_digest
from simulators.synthetic import synthesize
from smes_cli.console import console
from tests.running import until

KINDS = ["redis", pytest.param("kafka", marks=pytest.mark.kafka)]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        before, console.quiet = console.quiet, True
        stack.callback(setattr, console, "quiet", before)
        yield stack


def replayed(folder: Path, impressions: int) -> Replayed:
    log = folder / "world.parquet"
    synthesize(log, impressions, seed=5)
    return Replayed(log, impressions, "synthetic")


def assert_nothing_is_lost(figures: dict[str, Any], impressions: int) -> None:
    assert figures["digests_equal"]
    assert (figures["audit_balanced"], figures["audit_imbalances"]) == (True, [])
    assert figures["ledger_errors"] == []
    assert (figures["impressions"], figures["trained"]) == (impressions, impressions)
    assert figures["scorer_errors"] == 0, figures["scorer_error_messages"]
    assert figures["scorer_requests"] > 20


@pytest.mark.timeout(300)
def test_what_fails_for_a_while_leaves_no_trace(stack: ExitStack, tmp_path: Path) -> None:
    """Event log, snapshots and trainer are killed, the disk is full, and the clock jumps."""
    faults = [
        Fault("broker killed", 1.0, 0.2),
        Fault("disk full", 1.5, 0.2),
        Fault("clock back", 0.5, 0.2),
        Fault("store killed", 0.5, 0.2),
        Fault("trainer killed", 0.0, 0.2),
    ]

    figures = run_outages(System("redis", tmp_path, stack), replayed(tmp_path, 1500), faults, seed=1)

    assert_nothing_is_lost(figures, 1500)
    assert [each["fault"] for each in figures["happened"]] == [fault.kind for fault in faults]
    assert figures["exits"] == {}
    assert figures["checkpoints_refused"] > 0


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_moment_it_ends_as_if_never_killed(
    request: pytest.FixtureRequest, kind: EventLogKind, stack: ExitStack, tmp_path: Path
) -> None:
    system = System(kind, tmp_path, stack, kafka(request, kind))

    figures = run_kills(system, replayed(tmp_path, 6000), kills=5, life_s=4.0, seed=3)

    assert_nothing_is_lost(figures, 6000)
    assert figures["kills_that_moved_on"] >= 2


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_every_fault_of_the_plan_leaves_no_trace(
    request: pytest.FixtureRequest, kind: EventLogKind, stack: ExitStack, tmp_path: Path
) -> None:
    system = System(kind, tmp_path, stack, kafka(request, kind))

    figures = run_outages(system, replayed(tmp_path, 8000), plan(2, time_scale=0.5), seed=2)

    assert_nothing_is_lost(figures, 8000)
    assert figures["exits"] == {}


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_rollback_is_in_effect_in_every_scorer(stack: ExitStack, tmp_path: Path) -> None:
    figures = run_rollback(System("redis", tmp_path, stack), replayed(tmp_path, 8000), rounds=2)

    assert figures["scorer_errors"] == figures["left_the_old_version"] == 0
    assert figures["published_meanwhile"] > 0
    assert figures["rollback_s"] < 10  # a bound against hanging; docs/experiments/chaos.md has what was measured


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_malformed_events_and_a_soak_of_two_minutes(stack: ExitStack, tmp_path: Path) -> None:
    (tmp_path / "malformed").mkdir()
    (tmp_path / "soak").mkdir()

    found = run_malformed(System("redis", tmp_path / "malformed", stack), tmp_path, impressions=500, seed=1)
    soaked = run_soak(System("redis", tmp_path / "soak", stack), minutes=2, events_per_s=300, seed=1)

    assert found["malformed_dead_lettered"] == found["malformed"] == found["letters"]
    assert (found["good_trained"], found["audit_balanced"]) == (500, True)
    assert soaked["rows_replaced"] > 0
    assert (soaked["ledger_errors"], soaked["scorer_errors"]) == ([], 0)
    assert soaked["descriptors_growth"] <= 2
    assert soaked["threads_growth"] <= 2


def kafka(request: pytest.FixtureRequest, kind: str) -> Path | None:
    if kind == "redis":
        return None
    home: Path = request.getfixturevalue("kafka_home")
    return home


# ---- what counts as an error


class _Scorer:
    """An HTTP server that answers as a scorer does, or with whatever else a test says."""

    def __init__(self) -> None:
        self.answer: Callable[[dict[str, Any]], tuple[int, dict[str, Any]]] = good
        self.hold = threading.Event()
        self.asked = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.asked += 1
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if outer.hold.is_set():
                    self.close_connection = True
                    return
                status, body = outer.answer(request)
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments: Any) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self._thread = threading.Thread(target=self.server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()


def good(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    items = [{"item_id": item, "scores": {"click": 0.5}} for item in request["items"]]
    return 200, {"lineage": "a", "version": 1, "items": items, "ranking": request["items"][::-1]}


def without_an_item(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    status, body = good(request)
    return status, body | {"items": body["items"][1:]}


def not_a_number(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    status, body = good(request)
    body["items"][0]["scores"]["click"] = float("nan")
    return status, body


@pytest.fixture
def scorers() -> Iterator[dict[str, _Scorer]]:
    found = {"one": _Scorer(), "other": _Scorer()}
    yield found
    for scorer in found.values():
        scorer.close()


def asking(scorers: dict[str, _Scorer]) -> Caller:
    urls = {name: scorer.url for name, scorer in scorers.items()}
    ids = np.arange(20)
    return Caller(urls, ids, ids, ["click"], per_s=500, items_per_request=3)


def until_asked(caller: Caller, more: int = 10) -> None:
    begin = caller.answers.requests
    until(lambda: caller.answers.requests >= begin + more, "more requests")


def test_a_scorer_that_is_taken_down_is_no_error_and_one_that_fails_by_itself_is(scorers: dict[str, _Scorer]) -> None:
    caller = asking(scorers)
    caller.start()
    until_asked(caller)
    assert (caller.answers.errors, caller.answers.failed_over) == (0, 0)
    with caller.without("one"):
        scorers["one"].hold.set()
        until_asked(caller)
        asked = scorers["one"].asked
        until_asked(caller)
        assert scorers["one"].asked == asked
        scorers["one"].hold.clear()
    assert caller.answers.errors == 0
    scorers["one"].hold.set()
    until(lambda: caller.answers.errors > 0, "an error")
    answers = caller.stop()

    assert answers.messages[0].startswith("one: RemoteProtocolError")
    assert answers.versions == {("a", 1)}


@pytest.mark.parametrize("spoil", [without_an_item, not_a_number, lambda request: (503, {})])
def test_an_answer_that_is_not_whole_is_an_error(scorers: dict[str, _Scorer], spoil: Any) -> None:
    for scorer in scorers.values():
        scorer.answer = spoil
    caller = asking(scorers)
    caller.start()
    until_asked(caller)
    answers = caller.stop()

    assert answers.errors == answers.requests
    assert "nobody answered" in answers.messages[0]


# ---- what is compared, and what is done


def test_a_digest_sees_every_number_of_the_newest_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "smes.yaml"
    path.write_text(f"trainer: {{checkpoint: {{directory: {tmp_path}}}}}")
    arrays = {"learner.dense.a": np.arange(6.0), "stream.ledger": np.arange(3)}
    save_file(arrays, tmp_path / "step-000000000009-00000001.safetensors")
    save_file(arrays, tmp_path / "step-000000000007-00000002.safetensors")
    first = checkpoint_digest(path)
    learner = checkpoint_digest(path, "learner.")
    save_file(arrays | {"stream.ledger": np.array([0, 1, 3])}, tmp_path / "step-000000000008-00000003.safetensors")
    other_ledger = checkpoint_digest(path), checkpoint_digest(path, "learner.")
    shape = arrays | {"learner.dense.a": np.arange(6.0).reshape(2, 3)}
    save_file(shape, tmp_path / "step-000000000008-00000004.safetensors")

    assert other_ledger == (other_ledger[0], learner)
    assert len({first, other_ledger[0], checkpoint_digest(path)}) == 3
    assert checkpoint_digest(path, "learner.") != learner


def test_a_plan_is_seeded_and_has_every_fault_of_the_table() -> None:
    faults = plan(4)

    assert plan(4) == faults
    assert plan(5) != faults
    kinds = [fault.kind for fault in faults]
    assert [kinds.count(kind) for kind in ("broker killed", "store killed", "broker stopped", "disk full")] == [
        3,
        3,
        1,
        1,
    ]
    assert {fault.seconds for fault in faults if fault.kind == "broker stopped"} == {20.0}
    assert seconds_of(plan(4, time_scale=0.5)) == pytest.approx(seconds_of(faults) / 2)


_ASK_CLOCK = """
import pathlib, sys, threading, time
from benchmarks.chaos_clock import move_clock
move_clock(pathlib.Path(sys.argv[1]))
wait = threading.Event()
for line in sys.stdin:
    print(time.time() - float(line), flush=True)
    began_s = time.monotonic()
    wait.wait(0.01)
    assert time.monotonic() - began_s < 5
"""


def test_a_clock_jumps_there_and_back_and_waits_do_not(tmp_path: Path) -> None:
    clock = Clock(tmp_path / "clock")
    argv = [sys.executable, "-c", _ASK_CLOCK, str(tmp_path / "clock")]
    env = {"PATH": "/usr/bin", "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def offset_s() -> float:
            print(time.time(), file=process.stdin, flush=True)
            assert process.stdout is not None
            return float(process.stdout.readline())

        assert abs(offset_s()) < 60
        for jump_s in (3600, -7200, 0):
            clock.set(jump_s)
            until(lambda jump_s=jump_s: abs(offset_s() - jump_s) < 60, f"a jump to {jump_s}", 20)  # type: ignore[misc]
        process.stdin.close()
        assert process.wait(20) == 0


def test_a_full_disk_takes_nothing_more_and_is_empty_again(tmp_path: Path) -> None:
    with ExitStack() as stack:
        disk = make_disk(tmp_path / "disk", stack)
        file = disk.folder / "file"
        child = stack.enter_context(subprocess.Popen(["sleep", "60"]))
        stack.callback(child.kill)
        if disk.is_mounted:
            with disk.full(child.pid), pytest.raises(OSError, match="No space left on device"):
                file.write_bytes(bytes(1_000_000))
            assert list(disk.folder.glob("filler")) == []
        file.write_bytes(bytes(1_000_000))


def test_where_no_disk_can_be_mounted_the_process_may_write_no_long_file(tmp_path: Path) -> None:
    script = (
        "import sys\nfor line in sys.stdin:\n try: open('x', 'wb').write(bytes(1_000_000)); print('ok')\n"
        " except OSError as error: print(error.strerror)\n sys.stdout.flush()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        said = []
        with Disk(tmp_path, is_mounted=False).full(process.pid):
            print("write", file=process.stdin, flush=True)
            said.append(process.stdout.readline().strip())
        print("write", file=process.stdin, flush=True)
        said.append(process.stdout.readline().strip())
        process.stdin.close()

    assert said == ["File too large", "ok"]


# ---- figures


def test_growth_compares_the_time_after_the_warm_up_with_the_end() -> None:
    # 100 samples: the warm-up ends with sample 40; medians of 40 … 49 and of 90 … 99.
    rising = [float(i) for i in range(100)]
    flat = [*[1000.0 * i for i in range(40)], *[200.0] * 60]
    samples = {
        "rss.trainer": flat, "rss.scorer": rising, "redis.used": flat,
        "descriptors.trainer": flat, "descriptors.scorer": rising, "threads.trainer": flat, "threads.scorer": flat,
    }  # fmt: skip

    found = growth(samples, 0.4)

    assert found["rss_growth_pct"] == pytest.approx(100 * (94.5 / 44.5 - 1))
    assert found["redis_growth_pct"] == 0
    assert (found["descriptors_growth"], found["threads_growth"]) == (50, 0)


def test_the_summary_says_what_does_not_hold() -> None:
    kills = {"digests_equal": True, "audit_balanced": True, "scorer_errors": 0, "kills": 20}
    malformed = {"malformed": 9, "malformed_dead_lettered": 9, "good": 5, "good_trained": 5, "audit_balanced": True}
    fine = summary({"seed": 1, "kills": kills, "malformed": malformed})
    outages = {"digests_equal": False, "audit_balanced": True, "scorer_errors": 2}
    wrong = summary({"kills": kills, "outages": outages, "malformed": malformed | {"good_trained": 4}})

    assert holds(fine) == []
    assert (fine["kills"], fine["digests_equal"], fine["audit_balanced"], fine["scorer_errors"]) == (20, True, True, 0)
    assert holds(wrong) == [
        "digests_equal: False, expected True",
        "scorer_errors: 2, expected 0",
        "good_trained: 4, expected 5",
    ]


def test_the_options_of_the_figures_are_the_defaults() -> None:
    options = parsed(["--eventlog", "kafka"])

    assert (options.kills, options.limit, options.malformed, options.time_scale) == (20, 40_000, 10_000, 1.0)
    assert options.parts == ["kills", "outages", "malformed", "rollback", "gate"]
    with pytest.raises(SystemExit):
        parsed(["--parts", "peace"])
