"""The routing's table and heat maps, from what ``smes backtest --routing`` writes and of a ranker in a world."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks.routing import main, mean_overlap
from benchmarks.routing_plots import load_shares
from benchmarks.world_runs import BATCH
from smes.rankers.sparse.config import ExpertsConfig, SmesConfig

TASKS = ["click", "like", "share"]


def segment(instances: int, *, ended: bool, drift: list[float] | None = None) -> dict[str, Any]:
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


def write(path: Path, segments: list[dict[str, Any]], *, pools: int = 1) -> Path:
    report = {"tasks": TASKS, "num_experts": 4, "always_on": 0, "pools": pools, "probe_instances": 8}
    path.write_text(json.dumps(report | {"segments": segments}))
    return path


def test_a_line_per_segment_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    segments = [segment(400, ended=True), segment(400, ended=True, drift=[0.1, 0.2, 0.6]), segment(100, ended=False)]
    path, plot = write(tmp_path / "routing.json", segments, pools=2), tmp_path / "routing.png"
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
    short = write(tmp_path / "short.json", segments[2:])
    assert main([str(short), "--plot", str(plot)]) == 0, "before the first segment has ended there is a load at least"


def test_a_load_of_one_is_an_even_one(tmp_path: Path) -> None:
    report = json.loads(write(tmp_path / "routing.json", [segment(400, ended=True)]).read_text())
    expected = [[4, 0, 0, 0], [0, 2, 2, 0], [0, 1, 3, 0]]
    assert np.allclose(load_shares(report), [expected])
    assert mean_overlap(report["segments"][0]) == pytest.approx(0.2)
    # The first always runs; each task has two of its own to choose from. Evenly: half of its choices each.
    load = [[400, 100, 300, 0, 0], [400, 0, 0, 200, 200]]
    own_pools = {"always_on": 1, "pools": 2, "segments": [{"load": load}]}
    assert np.allclose(load_shares(own_pools), np.array([[[2.0, 0.5, 1.5, 0.0, 0.0], [2.0, 0.0, 0.0, 1.0, 1.0]]]))


def test_a_ranker_without_experts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write(tmp_path / "routing.json", []))]) == 2
    assert "expected the routing of a ranker with experts" in capsys.readouterr().err


def test_a_ranker_in_a_world(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = {
        "model.smes.experts.num": 16,
        "model.smes.encoder_dims": [8],
        "model.smes.trunk_dims": [8],
        "model.smes.experts.dims": [8],
    }
    rankers = {"smes": {"settings": tiny}, "linear": {"settings": {"model.ranker": "linear"}}}
    compared = {
        "smes": "smes",
        "paper": "smes",
        "linear": "linear",
        "dense": ["linear"],
        "experts": {},
        "rankers": rankers,
    }
    config, routing = tmp_path / "quality.yaml", tmp_path / "routing.json"
    config.write_text(yaml.safe_dump({"worlds": compared, "rare_worlds": compared, "kuairand": compared}))
    where = ["--world", "segments", "--impressions", str(64 * BATCH), "--config", str(config)]
    where += ["--chosen", str(tmp_path / "none.yaml")]
    assert main([*where, "--ranker", "smes", "--json", str(routing)]) == 0
    report = json.loads(routing.read_text())
    assert [segment["instances"] for segment in report["segments"]] == [32 * BATCH] * 2
    assert report["probe_instances"] == 512
    K = SmesConfig(experts=ExpertsConfig(num=16)).stages((0,)).per_router
    for segment in report["segments"]:
        assert {sum(of_task) for of_task in segment["load"]} == {32 * BATCH * K}
    first, last = (segment["drift"] for segment in report["segments"])
    assert first is None
    assert all(0 < value < 1 for value in last)
    capsys.readouterr()
    assert main([*where, "--ranker", "linear"]) == 2
    assert main([*where, "--ranker", "other"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "linear: no segments, expected the routing of a ranker with experts" in errors[0]
    assert "--ranker 'other': expected one of linear, smes" in errors[1]
