"""``smes demo`` as a user runs it: every part as a process of its own, on real servers.

With either event log, either codec and a log of any schema, the report has the documented keys, every event is
accounted for, no request fails, and no answer mixes versions. However the demo ends, by itself, by Ctrl-C or by
SIGKILL, none of its processes is left running.
"""

import os
import re
import signal
import stat
import subprocess
import uuid
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from simulators.logs.reader import open_log
from simulators.merge import replay_blocks
from simulators.synthetic import synthesize
from smes_cli.config import load_config
from smes_cli.freshness import ask_scorer
from smes_io.schema_file import load_builtin
from smes_scorer.freshness_stages import DEPENDS_ON
from tests.e2e.reports import SYNTHETIC_TASKS, assert_documented
from tests.e2e.shop import Shop
from tests.running import MARKER, environment, read_json, running, start_smes, until, until_log_says

ENDS_WITHIN_S = 300.0
KUAIRAND_TASKS = {task.name for task in load_builtin("kuairand").tasks}
pytestmark = pytest.mark.timeout(400)


class Demo:
    """A running demo with its own folder for temporary files and a mark by which its processes can be found."""

    def __init__(self, folder: Path, *arguments: str, **env: str) -> None:
        self.marker, self.log, self.temporary = uuid.uuid4().hex, folder / "demo.log", folder / "tmp"
        self._report = folder / "report.json"
        self.temporary.mkdir()
        inherited = environment(**env)
        for variable in ("REDIS_URL", "KAFKA_BOOTSTRAP"):  # the demo shall start its own servers
            inherited.pop(variable, None)
        inherited |= {MARKER: self.marker, "TMPDIR": str(self.temporary)}
        arguments = ("demo", "--report", str(self._report), *arguments)
        self.process: subprocess.Popen[bytes] = start_smes(self.log, *arguments, env=inherited)

    def exit_code(self) -> int:
        """Wait for the end. No process and no temporary file may be left."""
        status = self.process.wait(ENDS_WITHIN_S)
        until(lambda: not self.processes(), "the end of all its processes", 30)
        left = [path.name for path in self.temporary.iterdir()]
        assert [name for name in left if not name.startswith("torchinductor")] == []  # torch's own cache
        return status

    def processes(self) -> list[psutil.Process]:
        """All its running processes."""
        return running(self.marker, self.temporary)

    def report(self) -> dict[str, Any]:
        return read_json(self._report)

    def runs(self, *words: str) -> bool:
        """Whether, for each of these words, one of its processes has it in its command line."""
        lines = [" ".join(_command_line(process)) for process in self.processes()]
        return all(any(word in line for line in lines) for word in words)


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def assert_served(report: dict[str, Any]) -> None:
    scorer, snapshots, freshness = report["scorer"], report["snapshots"], report["freshness_ms"]
    assert scorer["requests"] > 0
    assert (scorer["errors"], scorer["mixed_versions"]) == (0, 0)
    assert 0 < scorer["p50_ms"] <= scorer["p99_ms"]
    assert snapshots["published"] >= 1
    assert snapshots["bytes_last"] > 0
    assert 1 <= snapshots["served"] <= snapshots["published"]
    assert 0 < freshness["p50"] <= freshness["p99"]
    stages = report["freshness_stages_ms"]
    assert list(stages) == list(DEPENDS_ON)
    assert all(spans["p50"] <= spans["p99"] and spans["mean"] >= 0 for spans in stages.values())
    assert max(spans["p50"] for spans in stages.values()) <= freshness["p99"]


def test_everything_on_one_machine_and_it_stays_up(tmp_path: Path) -> None:
    demo = Demo(tmp_path, "--limit", "3000", "--rate", "2000", "--stay", "--keep", str(tmp_path / "kept"))
    live = assert_stays_up(demo, tmp_path / "kept")
    assert demo.exit_code() == 0, demo.log.read_text()
    text = demo.log.read_text()
    assert "\x1b" not in text  # plain when piped
    assert "conservation: every event that was appended is accounted for" in text
    assert re.search(r"^ *trained → cut .*trainer\.snapshot_interval_s", text, re.MULTILINE)
    report = demo.report()
    assert_documented(report, SYNTHETIC_TASKS)
    assert_served(report)
    # The events of the same world, counted without the processes.
    synthesize(tmp_path / "again.parquet", 3000, 0)
    with open_log(tmp_path / "again.parquet", load_builtin("synthetic")) as reader:
        feedback = sum(len(received) for _, received in replay_blocks(reader, seed=0))
    assert (report["events"]["impressions"], report["feedback"]["received"]) == (3000, feedback)
    assert report["events"]["trained"] > 1000
    assert report["throughput"]["trained_per_s"] > 0
    of_trainer = ("events", "feedback", "tasks", "rows", "version")  # it knew everything already
    assert {name: live[name] for name in of_trainer} == {name: report[name] for name in of_trainer}
    assert report["scorer"]["requests"] > live["scorer"]["requests"]


def assert_stays_up(demo: Demo, folder: Path) -> dict[str, Any]:
    """When the replay is through, everything answers, and the report is shown; then ask for the end.

    Returns:
        The report of this moment.
    """
    until_log_says(demo.log, "everything stays up until Ctrl-C: ", demo.process)
    report, addresses = read_json(folder / "report.json"), read_json(folder / "addresses.json")
    assert report == demo.report()
    assert f"console: {addresses['console']}" in demo.log.read_text()
    assert stat.S_IMODE((folder / "addresses.json").stat().st_mode) == 0o600  # it has the console's token
    page, token = addresses["console"].split("#token=")
    with httpx.Client(timeout=30) as http:
        assert "<title>" in http.get(page).text
        bearer = {"authorization": f"Bearer {token}"}
        assert [http.post(f"{page}api/none", headers=h).status_code for h in ({}, bearer)] == [401, 405]
        assert http.get(f"{addresses['scorer']}/health/ready").json()["version"] == report["version"]
        shown = http.get(f"{addresses['trainer']}/v1/stats").json()["report"]
        assert shown["tasks"] == report["tasks"]
    # As `smes -c DIR/smes.yaml status` asks.
    assert ask_scorer(load_config(folder / "smes.yaml", {}), None, "/health/ready")[0] == addresses["scorer"]
    lines = [line for path in (folder / "history").glob("*.jsonl") for line in path.read_text().splitlines()]
    assert len(lines) >= 5
    demo.process.send_signal(signal.SIGINT)
    return report


@pytest.mark.kafka
@pytest.mark.kuairand
def test_a_kuairand_folder_on_kafka_as_json(kuairand_dir: Path, kafka_home: Path, tmp_path: Path) -> None:
    arguments = ("--log", str(kuairand_dir), "--limit", "3000", "--rate", "2000", "--eventlog", "kafka")
    demo = Demo(tmp_path, *arguments, "--codec", "json", KAFKA_HOME=str(kafka_home))
    assert demo.exit_code() == 0, demo.log.read_text()
    report = demo.report()
    assert_documented(report, KUAIRAND_TASKS)
    assert_served(report)
    assert report["events"]["impressions"] == 3000
    assert report["events"]["trained"] > 1000


def test_a_log_of_another_schema_by_its_schema_file_alone(shop: Shop, tmp_path: Path) -> None:
    arguments = ("--log", str(shop.folder), "--schema", str(shop.schema), "--limit", "5000", "--codec", "json")
    demo = Demo(tmp_path, *arguments)
    assert demo.exit_code() == 0, demo.log.read_text()
    report = demo.report()
    assert_documented(report, {"opened", "bought", "rating"})
    assert report["events"]["impressions"] == shop.visits
    assert report["feedback"]["received"] == shop.feedback
    assert (report["scorer"]["errors"], report["scorer"]["mixed_versions"]) == (0, 0)


def long_demo(folder: Path, **env: str) -> Demo:
    demo = Demo(folder, "--limit", "100000", "--rate", "300", **env)
    until(lambda: demo.runs(" train ", " serve", " replay ", " console ", "-server 127.0.0.1:"), "all its processes")
    return demo


def test_ctrl_c_ends_the_replay_with_a_report_and_failed_requests_are_status_3(tmp_path: Path) -> None:
    # The scorer refuses more than 10 items, and the demo asks for 50.
    demo = long_demo(tmp_path, SMES_SCORER__MAX_ITEMS="10")
    until_log_says(demo.log, "replaying and serving: ", demo.process)
    demo.process.send_signal(signal.SIGINT)
    assert demo.exit_code() == 3, demo.log.read_text()
    [failed] = [line for line in demo.log.read_text().splitlines() if line.startswith("failed: ")]
    assert failed.startswith("failed: scorer: ")
    report = demo.report()
    assert_documented(report, SYNTHETIC_TASKS)
    assert 0 < report["events"]["impressions"] < 100_000
    assert report["scorer"]["errors"] == report["scorer"]["requests"] > 0


def test_a_killed_demo_leaves_no_process(tmp_path: Path) -> None:
    demo = long_demo(tmp_path)
    assert len(demo.processes()) >= 6  # the demo, Valkey, trainer, scorer, replay, console
    os.kill(demo.process.pid, signal.SIGKILL)
    until(lambda: not demo.processes(), "the end of all its processes", 30)
