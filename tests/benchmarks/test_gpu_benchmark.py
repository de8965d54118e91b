import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from smes.rankers.sparse.experts import FullExperts, dispatch
from smes.rankers.sparse.routing import route


def test_it_runs_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "gpu.json"
    small = ["--device", "cpu", "--batch-sizes", "64", "--experts", "16", "--steps", "2", "--json", str(report)]
    assert gpu.main(small) == 0
    (row,) = json.loads(report.read_text())["rows"]
    assert row["batch_size"] == 64
    assert row["grouped_per_s"] > 0
    assert row["dense_per_s"] > 0
    assert row["active"] == 8, "4 of each of two task groups' own"
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "no usable CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("trim", [True, False])
def test_the_dense_execution_gives_the_same(trim: bool) -> None:
    torch.manual_seed(0)
    grouped = FullExperts(8, 16, (16, 8))
    dense = gpu.DenseExperts(8, 16, (16, 8))
    dense.load_state_dict(grouped.state_dict())
    h_BD = torch.randn(20, 16)
    plan = dispatch(route(torch.randn(20, 3, 8), torch.full((3,), 1 / 3), 1, 2), trim=trim)
    used = int(plan.offsets_E[-1])
    torch.testing.assert_close(dense(h_BD, plan)[:used], grouped(h_BD, plan)[:used])
