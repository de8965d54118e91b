"""Merging by event time, and pacing with a clock that only sleeping moves."""

import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simulators.config import ReplayConfig
from simulators.logs.reader import LogReader, open_log
from simulators.merge import MAX_BLOCK_BYTES, PendingFeedback, replay_blocks
from simulators.replay import MAX_WAIT_S, Replayer, ReplayReport
from simulators.replay_mark import MarkFile
from simulators.synthetic import synthesize
from smes.errors import Stopped
from smes.events import FeedbackBlock, ImpressionBlock
from smes_io.schema_file import SchemaFile, load_builtin, load_schema_file
from stream.codec.codec import Codec, Decoded, decode
from stream.log.event_log import OutRecord
from stream.log.memory_log import InMemoryLog
from stream.topics import FEEDBACK, IMPRESSIONS

N = 5_000


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0
        self.longest_s = 0.0

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.longest_s = max(self.longest_s, seconds)
        self.now_s += seconds

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(scope="module")
def schema_file() -> SchemaFile:
    return load_builtin("synthetic")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, schema_file: SchemaFile) -> Iterator[LogReader]:
    path = tmp_path_factory.mktemp("replay") / "world.parquet"
    synthesize(path, N, seed=1)
    with open_log(path, schema_file) as reader:
        yield reader


def replay(
    reader: LogReader, config: ReplayConfig, partitions: int = 3
) -> tuple[ReplayReport, InMemoryLog, Clock, list[tuple[float, ReplayReport]]]:
    clock = Clock()
    log = InMemoryLog(now_ms=lambda: round(clock.now_s * 1000) + 10**13)
    for topic in (IMPRESSIONS, FEEDBACK):
        log.ensure_topic(topic, partitions)
    progress: list[tuple[float, ReplayReport]] = []
    report = Replayer(reader, log, config, monotonic_s=clock, sleep=clock.sleep).run(
        on_progress=lambda report: progress.append((clock.now_s - 1000.0, report))
    )
    return report, log, clock, progress


def everything(log: InMemoryLog, reader: LogReader) -> Decoded:
    records = [
        record
        for topic in (IMPRESSIONS, FEEDBACK)
        for record in log.read(log.begin(topic), max_records=10**9, timeout_s=0).records
    ]
    return decode(records, reader.schema)


def by_id(block: ImpressionBlock) -> ImpressionBlock:
    return block.take(np.argsort(block.impression_id, kind="stable"))


def by_key(block: FeedbackBlock) -> list[tuple[int, int, int, float]]:
    columns = (block.impression_id, block.task, block.event_time_ms, block.value)
    return sorted(zip(*(c.tolist() for c in columns), strict=True))


def test_pairs_are_segments_of_event_time(reader: LogReader) -> None:
    last = -1
    impressions, feedback = [], []
    for seen, received in replay_blocks(reader, seed=2, rows_per_block=512):
        times = np.concatenate([seen.event_time_ms, received.event_time_ms])
        assert times.min() >= last
        last = int(times.max())
        assert (np.diff(seen.event_time_ms) >= 0).all()
        assert (np.diff(received.event_time_ms) >= 0).all()
        impressions.append(seen)
        feedback.append(received)
    assert sum(map(len, impressions)) == N
    whole = FeedbackBlock.concat([f for _, f in replay_blocks(reader, seed=2, rows_per_block=10**6)])
    assert by_key(FeedbackBlock.concat(feedback)) == by_key(whole)
    assert len(whole) > N


def test_pending_feedback_against_a_sorted_list() -> None:
    rng = np.random.default_rng(0)
    pending, waiting = PendingFeedback(), []
    until = 0
    for _ in range(60):
        times = np.sort(until + rng.integers(1, 1000, rng.integers(0, 30)))
        run = FeedbackBlock.empty(len(times))
        run.event_time_ms[:] = times
        pending.add(run)
        waiting += times.tolist()
        until += int(rng.integers(0, 150))
        due = pending.due(until)
        assert due.event_time_ms.tolist() == sorted(t for t in waiting if t <= until)
        waiting = [t for t in waiting if t > until]
        assert len(pending) == len(waiting)


@pytest.mark.parametrize("by_request", [False, True])
@pytest.mark.parametrize("codec", ["json", "arrow"])
def test_the_event_log_holds_exactly_the_log(reader: LogReader, codec: Codec, by_request: bool) -> None:
    config = ReplayConfig(codec=codec, by_request=by_request, seed=4, max_slice_events=700)
    report, log, _, progress = replay(reader, config)
    decoded = everything(log, reader)
    assert not decoded.dead
    expected = ImpressionBlock.concat([block.impressions for block in reader.blocks()])
    got = by_id(decoded.impressions)
    np.testing.assert_array_equal(got.ids, expected.ids)
    np.testing.assert_array_equal(got.event_time_ms, expected.event_time_ms)
    np.testing.assert_array_equal(got.request_id, expected.request_id)
    feedback = FeedbackBlock.concat([f for _, f in replay_blocks(reader, seed=4)])
    assert by_key(decoded.feedback) == by_key(feedback)
    assert report.finished
    assert (report.impressions, report.feedback) == (N, len(feedback))
    assert report.total_impressions == N
    assert report.bytes > 0
    assert len(progress) >= (N + len(feedback)) / 700


def test_the_rate_is_kept_and_smooth(reader: LogReader) -> None:
    report, _, clock, progress = replay(reader, ReplayConfig(rate=2000))
    events = report.impressions + report.feedback
    assert report.elapsed_s == pytest.approx(events / 2000, abs=0.06)
    assert clock.longest_s <= MAX_WAIT_S
    for at_s, so_far in progress:
        assert so_far.impressions + so_far.feedback <= 2000 * at_s + 1e-6
        assert so_far.impressions + so_far.feedback >= 2000 * (at_s - 0.051) - 100
    assert len(progress) == pytest.approx(events / 100, rel=0.05)


@pytest.mark.parametrize("speed", [1.0, 7.5])
def test_speed_is_event_time_per_wall_time(reader: LogReader, speed: float) -> None:
    report, _, _, progress = replay(reader, ReplayConfig(speed=speed))
    assert report.finished
    start_ms = next(reader.blocks(1)).impressions.event_time_ms[0]
    for at_s, so_far in progress:
        assert so_far.event_time_ms is not None
        reached_s = (so_far.event_time_ms - start_ms) / 1000 / speed
        assert reached_s <= at_s + 1e-3
        assert reached_s >= at_s - 0.3  # the synthetic feed has no longer gap
    gaps = np.diff([at_s for at_s, _ in progress])
    assert np.median(gaps) == pytest.approx(0.05, abs=0.02)


def test_event_time_advances_evenly_in_all_partitions(reader: LogReader) -> None:
    """After each append, no partition of either topic lags far: a joined watermark can follow."""
    _, log, _, _ = replay(reader, ReplayConfig(rate=2000, codec="json"), partitions=2)
    arrivals: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for topic in (IMPRESSIONS, FEEDBACK):
        records = log.read(log.begin(topic), max_records=10**9, timeout_s=0).records
        decoded = decode(records, reader.schema)
        for block in (decoded.impressions, decoded.feedback):
            for p, at, t in zip(block.partition, block.arrival_ms, block.event_time_ms, strict=True):
                arrivals.setdefault((topic, int(p)), []).append((int(at), int(t)))
    assert len(arrivals) == 4
    moments = sorted({at for events in arrivals.values() for at, _ in events})
    reached = np.array(
        [
            [max((t for at, t in events if at <= moment), default=0) for events in arrivals.values()]
            for moment in moments
        ]
    )
    impressions_end = len(moments) * 9 // 10  # the tail has feedback only
    settled = reached[10:impressions_end]
    assert (settled.max(axis=1) - settled.min(axis=1)).max() < 1000  # ms of event time


def test_stopping_leaves_what_was_sent(reader: LogReader) -> None:
    clock, log = Clock(), InMemoryLog()
    for topic in (IMPRESSIONS, FEEDBACK):
        log.ensure_topic(topic, 1)
    report = Replayer(reader, log, ReplayConfig(rate=1000), monotonic_s=clock, sleep=clock.sleep).run(
        stop=lambda: clock.now_s >= 1002.0
    )
    assert not report.finished
    assert report.impressions + report.feedback == pytest.approx(2000, abs=110)
    decoded = everything(log, reader)
    assert (len(decoded.impressions), len(decoded.feedback)) == (report.impressions, report.feedback)


def test_a_replay_that_falls_behind_catches_up(reader: LogReader) -> None:
    """An append that blocks for a second delays nothing that comes after it for longer than that."""
    clock = Clock()

    class Slow(InMemoryLog):
        def append(self, topic: str, records: Sequence[OutRecord]) -> None:
            super().append(topic, records)
            if topic == IMPRESSIONS and 1001.0 < clock.now_s < 1001.2:
                clock.now_s += 1.0

    log = Slow()
    for topic in (IMPRESSIONS, FEEDBACK):
        log.ensure_topic(topic, 1)
    report = Replayer(reader, log, ReplayConfig(rate=2000), monotonic_s=clock, sleep=clock.sleep).run()
    assert report.elapsed_s == pytest.approx((report.impressions + report.feedback) / 2000, abs=0.06)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"speed": 0}, r"ReplayConfig\.speed: 0, expected more than 0 or max"),
        ({"rate": -1.0}, r"ReplayConfig\.rate: -1\.0, expected more than 0, or null"),
        ({"rate": 5.0, "speed": 2.0}, r"ReplayConfig\.rate: 5\.0 beside speed 2\.0, expected one of them"),
        ({"slice_s": 0.0}, r"ReplayConfig\.slice_s: 0\.0, expected more than 0, at most 1"),
        ({"late_share": 1.5}, r"ReplayConfig\.late_share: 1\.5, expected at least 0, at most 1"),
        ({"max_slice_events": 0}, r"ReplayConfig\.max_slice_events: 0, expected at least 1"),
        ({"max_slice_bytes": 0}, r"ReplayConfig\.max_slice_bytes: 0, expected at least 1"),
        ({"outage_timeout_s": 0.0}, r"ReplayConfig\.outage_timeout_s: 0\.0, expected more than 0"),
    ],
)
def test_a_wrong_configuration_is_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReplayConfig(**wrong)  # type: ignore[arg-type]  # the point of the test


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LogReader]:
    """A log with a bag of 1,000 ids in every row: 8 KB a row, 96 MB in all."""
    folder, rows, length = tmp_path_factory.mktemp("wide"), 12_000, 1000
    ids = np.random.default_rng(0).integers(0, 10**6, rows * length)
    columns = {
        "user": np.arange(rows) % 100,
        "item": np.arange(rows) % 70,
        "ts": 1_600_000_000 + np.arange(rows),
        "click": np.arange(rows) % 2,
        "bag": pa.ListArray.from_arrays(np.arange(0, rows * length + 1, length, dtype=np.int32), ids),
    }
    pq.write_table(pa.table(columns), folder / "log.parquet")
    (folder / "s.yaml").write_text(
        "name: t\ntasks: [{name: click, window_s: 5}]\nfeatures: [{name: bag, kind: bag, max_length: 1000}]\n"
        "log: {user_id: user, item_id: item, event_time: ts, time_unit: s, labels: {click: click}}\n"
    )
    with open_log(folder / "log.parquet", load_schema_file(folder / "s.yaml")) as reader:
        yield reader


def test_blocks_are_bounded_by_bytes(wide: LogReader) -> None:
    """Neither the pairs nor what the reader holds for them grow with the width of a row."""
    assert wide.total == 12_000
    tracemalloc.start()
    try:
        sizes = [impressions.ids.nbytes for impressions, _ in replay_blocks(wide)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(sizes) > 96 * 10**6
    assert max(sizes) <= MAX_BLOCK_BYTES
    assert peak < 3 * MAX_BLOCK_BYTES


def test_appends_are_bounded_by_bytes(wide: LogReader) -> None:
    clock, log = Clock(), InMemoryLog()
    for topic in (IMPRESSIONS, FEEDBACK):
        log.ensure_topic(topic, 1)
    config = ReplayConfig(max_slice_bytes=2**20)
    report = Replayer(wide, log, config, monotonic_s=clock, sleep=clock.sleep).run()
    records = log.read(log.begin(IMPRESSIONS), max_records=10**9, timeout_s=0).records
    assert report.impressions == 12_000
    assert sum(len(record.value) for record in records) > 48 * 10**6
    assert max(len(record.value) for record in records) < 2**20


def test_a_row_larger_than_an_append_may_be_is_appended_alone(wide: LogReader) -> None:
    log = InMemoryLog()
    for topic in (IMPRESSIONS, FEEDBACK):
        log.ensure_topic(topic, 1)
    seen: list[int] = []
    Replayer(wide, log, ReplayConfig(max_slice_bytes=1)).run(
        on_progress=lambda report: seen.append(report.impressions + report.feedback), stop=lambda: len(seen) >= 5
    )
    assert seen == [1, 2, 3, 4, 5]


def test_a_replay_that_is_told_to_stop_while_it_waits_reports_what_was_appended(reader: LogReader) -> None:
    class Away(InMemoryLog):
        def append(self, topic: str, records: Sequence[OutRecord]) -> None:
            if len(self.read(self.begin(IMPRESSIONS), max_records=10**9, timeout_s=0).records) >= 4:
                raise Stopped("appending: no answer yet when a stop was asked for")
            super().append(topic, records)

    log = Away()
    for topic in (IMPRESSIONS, FEEDBACK):
        log.ensure_topic(topic, 2)
    report = Replayer(reader, log, ReplayConfig(max_slice_events=500)).run()
    assert not report.finished
    assert 0 < report.impressions < N


def test_kuairand_replays_without_dead_letters(kuairand_dir: Path) -> None:
    schema_file = load_builtin("kuairand")
    with open_log(kuairand_dir, schema_file, limit=3000) as reader:
        report, log, _, _ = replay(reader, ReplayConfig())
        decoded = everything(log, reader)
    assert not decoded.dead
    assert len(decoded.impressions) == report.impressions == 3000
    watched = decoded.feedback.take(decoded.feedback.task == schema_file.schema.task_index["watch_time"])
    assert len(watched) == 3000


@pytest.mark.parametrize("killed", [False, True], ids=["stopped", "killed"])
def test_with_its_mark_a_replay_goes_on_where_it_was(reader: LogReader, tmp_path: Path, killed: bool) -> None:
    config = ReplayConfig(seed=3, max_slice_events=300)
    _, expected, _, _ = replay(reader, config)
    clock, what = Clock(), {"seed": "3"}
    log = InMemoryLog()
    for topic in (IMPRESSIONS, FEEDBACK):
        log.ensure_topic(topic, 3)
    finished, repeated = False, 0
    while not finished:
        file = MarkFile(tmp_path / "mark", what, clock)
        mark = file.read()
        replayer = Replayer(reader, log, config, begin=(mark.impressions, mark.feedback), monotonic_s=clock)
        appends = iter(range(7))
        reports: list[ReplayReport] = []

        def on_progress(report: ReplayReport, clock: Clock = clock, reports: list[ReplayReport] = reports) -> None:
            reports.append(report)
            clock.now_s += 0.3
            file.write_if_due(report)  # noqa: B023 - called within the loop's turn

        report = replayer.run(on_progress=on_progress, stop=lambda: next(appends, None) is None)  # noqa: B023
        if not killed or report.finished:
            file.write(report)
        before = file.read()
        repeated += report.impressions + report.feedback - before.impressions - before.feedback
        finished = report.finished

    assert (repeated > 0) == killed
    assert (report.impressions, report.feedback) == (reader.total, len(everything(expected, reader).feedback))
    assert file.read().finished
    got, wanted = everything(log, reader), everything(expected, reader)
    assert len(got.impressions) + len(got.feedback) == len(wanted.impressions) + len(wanted.feedback) + repeated
    ids, first = np.unique(got.impressions.impression_id, return_index=True)
    assert by_id(got.impressions.take(first)).arrays().keys() == wanted.impressions.arrays().keys()
    np.testing.assert_array_equal(ids, np.sort(wanted.impressions.impression_id))
    assert set(zip(got.feedback.impression_id.tolist(), got.feedback.event_time_ms.tolist(), strict=True)) == set(
        zip(wanted.feedback.impression_id.tolist(), wanted.feedback.event_time_ms.tolist(), strict=True)
    )


def test_a_mark_of_another_replay_or_of_nothing_is_refused(reader: LogReader, tmp_path: Path) -> None:
    path = tmp_path / "mark"
    report, _, _, _ = replay(reader, ReplayConfig())
    MarkFile(path, {"seed": "3"}).write(report)
    with pytest.raises(ValueError, match=r"mark: the mark of another replay \(seed 4, there 3\)"):
        MarkFile(path, {"seed": "4"}).read()
    for text in ("", "{}", '{"what": {}, "impressions": -1}', "\0"):
        path.write_text(text)
        with pytest.raises(ValueError, match="expected the mark of a replay, or no file"):
            MarkFile(path, {"seed": "3"}).read()
