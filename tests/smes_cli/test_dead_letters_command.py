"""``smes dead-letters`` and ``smes audit`` as users see them, on a real Valkey with the real trainer.

Guarantee shown: what is printed is what is in the log; what is replayed is trained on once, also where the command or
the trainer is killed; an audit that fails says what does not balance and exits with 3.
"""

import base64
import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis

from simulators.synthetic import synthesize
from smes.schema import Schema
from smes_cli.__main__ import run
from smes_cli.config import Config
from smes_cli.demo.processes import log_tail
from stream.codec.codec import encode_impressions
from stream.dead_letter_reading import StoredLetter, read_entries
from stream.log.event_log import OutRecord
from stream.log.open_log import open_event_log
from stream.topics import FEEDBACK, IMPRESSIONS
from tests.integration.training import Pairs, drain, fill, read_pairs
from tests.running import DEADLINE_S, read_config, start_smes, until, until_log_says, write_config

Captured = pytest.CaptureFixture[str]
OTHER_SCHEMA = (("codec", b"json"), ("schema", b"0123456789abcdef"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("letters") / "world.parquet"
    synthesize(path, 1500, seed=6)
    return path


@pytest.fixture
def path(redis_url: str, namespace: str, tmp_path: Path) -> Path:
    return write_config(tmp_path, redis_url, namespace)


def of_another_schema(pairs: Pairs, schema: Schema, partitions: int) -> list[OutRecord]:
    """The last impressions of the log, once more, with new ids and the header of another schema."""
    impressions = [shown for shown, _ in pairs if len(shown)][-1]
    impressions.impression_id[:] += 10**9
    records = encode_impressions(impressions, schema, "json", partitions)
    return [OutRecord(record.value, OTHER_SCHEMA, record.partition) for record in records]


def fill_with_bad(config: Config, world: Path) -> tuple[int, int]:
    """A log with good events, some of another schema, and some that are beyond help; numbers of the latter two."""
    pairs = read_pairs(config, world)
    schema, partitions = config.schema_file().schema, config.event_log.partitions
    with closing(open_event_log(config.event_log)) as log:
        fill(config, log, pairs, "json")
        fixable = of_another_schema(pairs, schema, partitions)
        log.append(IMPRESSIONS, fixable)
        broken = [OutRecord(b'{"impression_id": 1', (), 0), OutRecord(b"\xff\x00\x1b", (("codec", b"json"),), 1)]
        log.append(FEEDBACK, broken)
    return len(fixable), len(broken)


def smes(path: Path, capsys: Captured, *arguments: str, code: int = 0) -> str:
    """What a command prints."""
    capsys.readouterr()
    got = run(["-c", str(path), *arguments])
    captured = capsys.readouterr()
    assert got == code, captured.err
    return captured.out if code == 0 else captured.err


def as_json(path: Path, capsys: Captured, *arguments: str) -> Any:
    return json.loads(smes(path, capsys, *arguments, "--json"))


def test_letters_are_listed_shown_replayed_trained_on_once_and_the_audit_balances(
    path: Path, world: Path, capsys: Captured
) -> None:
    config = read_config(path)
    assert "no dead letters" in smes(path, capsys, "dead-letters", "list")
    fixable, broken = fill_with_bad(config, world)
    before = drain(config)

    # list
    text = smes(path, capsys, "dead-letters", "list")
    rows = {line.split()[0]: line.split() for line in text.splitlines()[1:]}
    assert rows["schema_mismatch"][1:5] == [IMPRESSIONS, str(fixable), str(fixable), "0"]
    assert rows["unparsable"][1:5] == [FEEDBACK, str(broken), str(broken), "0"]
    groups = as_json(path, capsys, "dead-letters", "list", "--by", "partition")["groups"]
    assert {(g["reason"], g["where"]): g["letters"] for g in groups if g["topic"] == FEEDBACK} == {
        ("unparsable", "0"): 1,
        ("unparsable", "1"): 1,
    }
    for by, digits in (("hour", 13), ("day", 10)):
        groups = as_json(path, capsys, "dead-letters", "list", "--by", by)["groups"]
        assert sum(g["letters"] for g in groups) == fixable + broken
        assert {len(g["where"]) for g in groups} == {digits}
    assert "no dead letters" in smes(path, capsys, "dead-letters", "list", "--until", "7d")
    listed = as_json(path, capsys, "dead-letters", "list", "--by", "letter", "--topic", FEEDBACK, "--since", "1h")
    assert {each["code"] for each in listed} == {"unparsable"}

    # show
    [damaged] = [each for each in listed if each["partition"] == 1]
    shown = as_json(path, capsys, "dead-letters", "show", damaged["id"][:8])
    assert base64.b64decode(shown["payload"]) == b"\xff\x00\x1b"
    assert shown["replayed"] is False
    place = f"{damaged['topic']}/{damaged['partition']}/{damaged['offset']}"
    page = smes(path, capsys, "dead-letters", "show", place)
    for said in (
        damaged["id"],
        place,
        "unparsable: expected a JSON object",
        "codec = json",
        "payload   3 bytes",
        "    \\xff\\x00\\x1b",
    ):
        assert said in page
    assert page.replace("\n", "").isprintable()

    # replay
    dry = as_json(path, capsys, "dead-letters", "replay", "--all", "--dry-run", "--adopt-schema")
    assert (dry["appended"], dry["refused"], dry["too_late"]) == (fixable, {"unparsable": broken}, 0)
    said = smes(path, capsys, "dead-letters", "replay", "--reason", "schema_mismatch")
    assert f"{fixable:,} would be refused again: schema_mismatch; --adopt-schema takes them" in said
    done = as_json(path, capsys, "dead-letters", "replay", "--reason", "schema_mismatch", "--adopt-schema")
    assert {**dry, "dry_run": False, "chosen": fixable, "refused": {}} == done
    again = as_json(path, capsys, "dead-letters", "replay", "--all", "--adopt-schema")
    assert (again["appended"], again["replayed_before"]) == (0, fixable)
    rows = {line.split()[0]: line.split() for line in smes(path, capsys, "dead-letters", "list").splitlines()[1:]}
    assert (rows["schema_mismatch"][4], rows["unparsable"][4]) == (str(fixable), "0")

    # train, and audit before and after
    unread = as_json(path, capsys, "audit")
    assert unread["balanced"]
    assert sum(each["unread"] for each in unread["partitions"]) == fixable
    after = drain(config, flush=True)
    assert after["events"]["impressions"] == before["events"]["impressions"] + fixable
    assert after["events"]["trained"] == 1500 + fixable
    assert (after["events"]["duplicate"], after["events"]["late"]) == (0, 0)
    result = as_json(path, capsys, "audit")
    assert result["balanced"]
    assert sum(each["reinjected"] for each in result["partitions"]) == result["letters_replayed"] == fixable
    assert result["checkpoint"]["step"] == after["version"]
    marks = path.parent / "marks"
    text = smes(path, capsys, "audit", "--marks", str(marks))
    assert len(marks.read_text().splitlines()) == 4
    assert f"balanced: {4 * 5 + 2} equations hold" in text
    assert "impressions, all" in text


def test_wrong_choices_are_refused_in_one_line(path: Path, world: Path, capsys: Captured) -> None:
    fill_with_bad(read_config(path), world)
    drain(read_config(path))

    def refused(*arguments: str, code: int = 2) -> str:
        [line] = [x for x in smes(path, capsys, "dead-letters", *arguments, code=code).splitlines() if "WARN" not in x]
        return line

    assert "expected letters, an option that chooses some, or --all" in refused("replay")
    assert "--reason 'late': expected one of unparsable, " in refused("list", "--reason", "late")
    assert "--since 'soon': expected a time as" in refused("list", "--since", "soon")
    assert "expected an id, at least its first four hex digits" in refused("show", "x")
    assert "letter 0123456789abcdef: not there" in refused("show", "0123456789abcdef", code=1)


def test_an_audit_without_a_checkpoint_and_one_that_fails_say_so(
    path: Path, world: Path, capsys: Captured, redis_url: str, namespace: str
) -> None:
    config = read_config(path)
    assert "no checkpoint, expected one to audit" in smes(path, capsys, "audit", code=1)
    pairs = read_pairs(config, world)
    with closing(open_event_log(config.event_log)) as log:
        fill(config, log, pairs[:4], "json")
        drain(config)
        fill(config, log, pairs[4:], "json")
        position = log.begin(IMPRESSIONS)
        assert position
    assert as_json(path, capsys, "audit")["balanced"]
    end = {
        each["partition"]: each for each in as_json(path, capsys, "audit")["partitions"] if each["topic"] == IMPRESSIONS
    }
    lost, position_of_0 = 7, end[0]["position"]
    with redis.Redis.from_url(redis_url) as client:
        [key] = client.scan_iter(f"*{namespace}*:log:{IMPRESSIONS}:0")
        client.xtrim(key, minid=f"0-{position_of_0 + lost + 1}", approximate=False)

    said = smes(path, capsys, "audit", code=3)

    assert (
        f"does not balance: log: {IMPRESSIONS}/0: {lost} records were trimmed unread, offsets {position_of_0} … "
        f"{position_of_0 + lost - 1}" in said
    )
    capsys.readouterr()
    assert run(["-c", str(path), "audit", "--json"]) == 3
    result = json.loads(capsys.readouterr().out)
    assert not result["balanced"]
    [imbalance] = result["imbalances"]
    assert imbalance["numbers"] == {
        "position": position_of_0,
        "begin": position_of_0 + lost,
        "trimmed_unread": lost,
    }


def test_tail_prints_the_newest_letters_and_follows(path: Path, world: Path, tmp_path: Path) -> None:
    config = read_config(path)
    out = tmp_path / "tail.txt"
    process = start_smes(out, "-c", str(path), "dead-letters", "tail", "-n", "1", "--topic", FEEDBACK)
    with closing(open_event_log(config.event_log)) as log:
        for topic in (IMPRESSIONS, FEEDBACK):
            log.ensure_topic(topic, 2)
        log.append(FEEDBACK, [OutRecord(b"one", (), 0)])
        drain(config)
        until_log_says(out, "feedback/0/0  unparsable", process)
        log.append(IMPRESSIONS, [OutRecord(b"no feedback", (), 0)])
        log.append(FEEDBACK, [OutRecord(b"two", (), 1)])
        drain(config)
        until_log_says(out, "feedback/1/0  unparsable", process)
    assert stopped(process) == 0
    assert "impressions/0/0" not in log_tail(out, 100)
    second = tmp_path / "again.txt"
    process = start_smes(second, "-c", str(path), "dead-letters", "tail", "-n", "2", "--json")
    until(lambda: len(log_tail(second, 100).splitlines()) == 2, "two letters")
    assert stopped(process) == 0
    assert [json.loads(line)["topic"] for line in log_tail(second, 100).splitlines()] == [IMPRESSIONS, FEEDBACK]


def stopped(process: subprocess.Popen[bytes]) -> int:
    """Its exit code after SIGTERM."""
    process.terminate()
    return process.wait(DEADLINE_S)


def new_files(folder: Path, before: set[Path]) -> set[Path]:
    return set(folder.glob("*.safetensors")) - before


def replayed_so_far(config: Config) -> int:
    with closing(open_event_log(config.event_log)) as log:
        return sum(log.end(IMPRESSIONS).values())


def test_replays_that_are_killed_append_nothing_twice(
    path: Path, world: Path, tmp_path: Path, capsys: Captured
) -> None:
    config = read_config(path)
    pairs = read_pairs(config, world, rows_per_block=1500)
    schema = config.schema_file().schema
    with closing(open_event_log(config.event_log)) as log:
        fill(config, log, [], "json")
        records = encode_impressions(pairs[0][0], schema, "json", 2)
        log.append(IMPRESSIONS, [OutRecord(record.value, OTHER_SCHEMA, record.partition) for record in records])
        drain(config)
        letters = [entry for entry in read_entries(log) if isinstance(entry, StoredLetter)]
        assert len(letters) == len(records)
        before = sum(log.end(IMPRESSIONS).values())

    kills = 0
    for attempt in range(3):
        out = tmp_path / f"replay-{attempt}.txt"
        already = replayed_so_far(config)
        process = start_smes(out, "-c", str(path), "dead-letters", "replay", "--all", "--adopt-schema")
        deadline = time.monotonic() + DEADLINE_S
        while process.poll() is None and replayed_so_far(config) == already:
            assert time.monotonic() < deadline
        process.kill()
        kills += process.wait() != 0
    outcome = as_json(path, capsys, "dead-letters", "replay", "--all", "--adopt-schema")

    assert kills >= 1
    assert outcome["appended"] + outcome["found"] + outcome["replayed_before"] == len(records)
    assert replayed_so_far(config) == before + len(records)
    report = drain(config, flush=True)
    assert (report["events"]["trained"], report["events"]["duplicate"]) == (len(records), 0)
    assert as_json(path, capsys, "audit")["balanced"]


def test_the_audit_balances_after_a_trainer_was_killed_and_beside_one_that_runs(
    world: Path, tmp_path: Path, capsys: Captured, redis_url: str, namespace: str
) -> None:
    path = write_config(tmp_path, redis_url, namespace, trainer={"lease_s": 1.0})
    config = read_config(path)
    fixable, broken = fill_with_bad(config, world)
    folder = config.trainer.checkpoint.directory
    assert folder is not None
    for attempt in range(2):
        out = tmp_path / f"train-{attempt}.txt"
        files = set(folder.glob("*.safetensors"))
        process = start_smes(out, "-c", str(path), "train")
        until(partial(new_files, folder, files), "a checkpoint")
        running = as_json(path, capsys, "audit")
        process.kill()
        process.wait()
        killed = as_json(path, capsys, "audit")
        assert running["balanced"], running["imbalances"]
        assert killed["balanced"], killed["imbalances"]
    with redis.Redis.from_url(redis_url) as client:  # the killed one's lease ends by itself
        until(lambda: not [*client.scan_iter(f"*{namespace}*:lease")], "the end of the lease")
    report = drain(config, flush=True)
    result = as_json(path, capsys, "audit")
    assert result["balanced"], result["imbalances"]
    assert report["events"]["impressions"] == 1500 + fixable
    with closing(open_event_log(config.event_log)) as log:
        found = [entry for entry in read_entries(log) if isinstance(entry, StoredLetter)]
    assert len({each.id for each in found}) == fixable + broken
    assert sum(result["letters"].values()) == fixable + broken


@pytest.fixture(autouse=True)
def _no_leftovers(redis_url: str, namespace: str) -> Iterator[None]:
    yield
    with redis.Redis.from_url(redis_url) as client:
        for key in client.scan_iter(f"*{namespace}*"):
            client.delete(key)
