"""The routing's table and heat maps, from what ``smes backtest --routing`` writes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.routing import main, mean_overlap
from benchmarks.routing_plots import load_shares

TASKS = ["click", "like", "share"]


def stretch(instances: int, *, ended: bool, drift: list[float] | None = None) -> dict[str, Any]:
    load = [[instances, 0, 0, 0], [0, instances // 2, instances // 2, 0], [0, instances // 4, 3 * instances // 4, 0]]
    overlap = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.6], [0.0, 0.6, 1.0]]
    return {
        "steps": instances // 100,
        "instances": instances,
        "load": load,
        "dead": [3],
        "load_skew": 1.5,
        "load_skew_of_pools": [1.5],
        "load_skew_of_tasks": [4.0, 2.0, 3.0],
        "overlap": overlap if ended else None,
        "drift": drift,
    }


def write(path: Path, stretches: list[dict[str, Any]], *, always_on: int = 0) -> Path:
    report = {"tasks": TASKS, "num_experts": 4, "always_on": always_on, "pools": 1, "probe_instances": 8}
    path.write_text(json.dumps(report | {"stretches": stretches}))
    return path


def test_a_line_a_stretch_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stretches = [stretch(400, ended=True), stretch(400, ended=True, drift=[0.1, 0.2, 0.6]), stretch(100, ended=False)]
    path, plot = write(tmp_path / "routing.json", stretches, always_on=1), tmp_path / "routing.png"
    assert main([str(path)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [
        ["400", "4", "1", "1.50", "click", "4.00", "0.200", "–"],
        ["800", "4", "1", "1.50", "click", "4.00", "0.200", "0.300"],
        ["900", "1", "1", "1.50", "click", "4.00", "–", "–"],
    ]
    pytest.importorskip("matplotlib")
    assert main([str(path), "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    short = write(tmp_path / "short.json", stretches[2:])
    assert main([str(short), "--plot", str(plot)]) == 0, "before the first stretch has ended there is a load at least"


def test_a_load_of_one_is_an_even_one(tmp_path: Path) -> None:
    report = json.loads(write(tmp_path / "routing.json", [stretch(400, ended=True)]).read_text())
    expected = [[4, 0, 0, 0], [0, 2, 2, 0], [0, 1, 3, 0]]
    assert np.allclose(load_shares(report), [expected])
    assert mean_overlap(report["stretches"][0]) == pytest.approx(0.2)


def test_a_ranker_without_experts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write(tmp_path / "routing.json", []))]) == 2
    assert "expected the routing of a ranker with experts" in capsys.readouterr().err
