"""``smes snapshots`` as operators use it: what is marked, decided and told, and what lies between two versions."""

import getpass
from collections.abc import Iterator
from pathlib import Path

import pytest

from feature_store.snapshots import SnapshotStore
from smes_cli.__main__ import run
from smes_cli.status import deployment_status
from tests.integration.training import snapshots_of
from tests.running import read_config, read_json, write_config
from tests.smes_scorer.chains import Chain, four_versions

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def path(tmp_path: Path, redis_url: str, namespace: str) -> Path:
    return write_config(tmp_path, redis_url, namespace)


@pytest.fixture
def store(path: Path) -> Iterator[SnapshotStore]:
    with snapshots_of(read_config(path)) as store:
        yield store


@pytest.fixture
def chain(store: SnapshotStore) -> Chain:
    return four_versions(store)


class Command:
    """``smes snapshots``, and what it printed."""

    def __init__(self, path: Path, capsys: Captured) -> None:
        self._path, self._capsys = path, capsys

    def __call__(self, *arguments: str) -> str:
        assert run(["-c", str(self._path), "snapshots", *arguments]) == 0
        return "".join(f"{line.rstrip()}\n" for line in self._capsys.readouterr().out.splitlines())

    def refused(self, *arguments: str, status: int = 1) -> str:
        assert run(["-c", str(self._path), "snapshots", *arguments]) == status
        return self._capsys.readouterr().err


@pytest.fixture
def snapshots(path: Path, capsys: Captured) -> Command:
    return Command(path, capsys)


def test_one_command_goes_back_and_the_list_says_what_is_served(
    snapshots: Command, chain: Chain, store: SnapshotStore, path: Path
) -> None:
    out = snapshots("rollback", "--why", "AUC fell", "--by", "kim@desk")
    assert out == "a:3 is pinned; what was published after it is rolled back; before: a:4\n"
    listed = snapshots("list").splitlines()
    assert [line.split()[1] for line in listed[1:]] == ["1", "2", "3", "4"]
    assert listed[3].endswith(" pinned")
    assert deployment_status(read_config(path))["snapshots"]["pinned"] is True
    assert listed[4].endswith(" current, rolled back")

    assert snapshots("promote", "2").startswith("a:2 is in service, until the next publication; before: a:3")
    assert snapshots("list").splitlines()[2].endswith(" in service")
    assert snapshots("pin", "a:1").startswith("a:1 is pinned; before: a:2")
    assert snapshots("unpin").splitlines() == [
        "a:4 is in service, and what is published after it; before: a:1",
        "a:4 was rolled back before, and is in service again",
    ]
    manifest = store.to_serve()
    assert manifest is not None
    assert manifest.version == 4


def test_a_held_version_is_listed_with_its_reason_and_can_be_promoted(
    snapshots: Command, chain: Chain, store: SnapshotStore
) -> None:
    held = chain.publish(held="click: NE 0.04 worse")
    assert snapshots("list").splitlines()[-1].endswith(" held: click: NE 0.04 worse")

    assert snapshots("promote").startswith(f"a:{held.version} is in service, until the next publication; before: a:4")

    assert snapshots("list").splitlines()[-1].endswith(" current, promoted, was held: click: NE 0.04 worse")


def test_the_history_says_when_who_what_and_why(snapshots: Command, chain: Chain) -> None:
    assert snapshots("history") == "nothing was decided yet: scorers serve the current snapshot\n"
    snapshots("pin", "2", "--why", "[bold] a test of :smile:")
    snapshots("unpin", "--by", "lee")

    lines = [line.split() for line in snapshots("history").splitlines()[1:]]

    assert [line[3:5] for line in lines] == [["pin", "a:2"], ["unpin", "a:4"]]
    assert lines[0][2].startswith(f"{getpass.getuser()}@")
    assert (lines[0][5:], lines[1][2]) == (["a:4", "[bold]", "a", "test", "of", ":smile:"], "lee")


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (["pin", "9"], "snapshot a:9: not in Redis", 1),
        (["pin", "zzz:1"], "snapshot zzz:1: not in Redis", 1),
        (["pin", "b:1", "--lineage", "a"], "another lineage than --lineage a", 2),
        (["pin", "latest"], "expected VERSION or LINEAGE:VERSION", 2),
        (["unpin"], "nothing is pinned", 1),
        (["rollback", "4"], "which is in service", 1),
        (["rollback", "--lineage", "b"], "no snapshot of lineage b is listed from before a:4", 1),
        (["promote"], "no snapshot is held", 1),
        (["diff", "1", "9"], "snapshot a:9: not in Redis", 1),
    ],
)
def test_what_cannot_be_done_is_one_line(
    snapshots: Command, chain: Chain, arguments: list[str], message: str, status: int
) -> None:
    err = snapshots.refused(*arguments, status=status)

    assert message in err
    assert "Traceback" not in err
    assert status == 2 or len(err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["rollback"], ["promote"], ["pin", "1"], ["diff", "1", "2"], ["list"]])
def test_nothing_is_published_yet(snapshots: Command, arguments: list[str]) -> None:
    assert len(snapshots.refused(*arguments).splitlines()) == 1


def test_a_broken_decision_is_said_in_the_list(
    snapshots: Command, chain: Chain, store: SnapshotStore, namespace: str, redis_url: str
) -> None:
    snapshots("pin", "2")
    store._client.set(f"{{{namespace}}}:snapshots:decision", b"junk")

    listed = snapshots("list")

    assert listed.splitlines()[-1].endswith(
        "expected a decision about serving: JSON is malformed: invalid character (byte 0)"
    )


def test_diff_shows_metrics_rows_dense_weights_and_routing(snapshots: Command, chain: Chain, tmp_path: Path) -> None:
    chain.publish(metrics=metrics(auc=0.71, ne=0.8, load=[0.5, 0.5]))
    chain.publish(metrics=metrics(auc=0.75, ne=None, load=[0.8, 0.2]))

    out = snapshots("diff", "5", "a:6", "--report", str(tmp_path / "diff.json"))

    words = [line.split() for line in out.splitlines()]
    assert ["click", "auc", "0.7100", "0.7500", "+0.0400"] in words
    assert ["click", "ne", "0.8000", "–", "–"] in words
    assert ["load", "that", "moved", "0.3000"] in words
    assert ["routing.dead", "0", "1", "+1"] in words
    assert any(line[:1] == ["rows:"] and "changed" in line for line in words)
    assert any(line[:3] == ["dense,", "in", "all"] for line in words)
    report = read_json(tmp_path / "diff.json")
    assert (report["a"]["version"], report["b"]["version"]) == (5, 6)
    assert report["rows"]["changed"] > 0
    assert report["tasks"]["click"]["auc"] == [0.71, 0.75]


def test_diff_asks_for_a_lineage_where_nothing_is_in_service(snapshots: Command, store: SnapshotStore) -> None:
    Chain(store).publish("full", held="the first cut")

    assert "version 1: nothing is in service, expected LINEAGE:VERSION" in snapshots.refused("diff", "1", "1")
    assert snapshots("diff", "a:1", "a:1").startswith("rows: ")


def metrics(auc: float, ne: float | None, load: list[float]) -> dict[str, object]:
    routing = {"dead": int(min(load) < 0.3), "drift": None}
    return {
        "tasks": {"click": {"examples": 10, "auc": auc, "ne": ne}},
        "experts": {"load_share": load, "routing": routing},
    }
