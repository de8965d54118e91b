import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from benchmarks import gpu
from smes.rankers.sparse.config import ExpertNorm, SmesConfig
from smes.rankers.sparse.experts import FullExperts
from smes.rankers.sparse.packing import dispatch
from smes.rankers.sparse.routing import route
from tests.smes.plain_smes import changed


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


def test_multiply_adds_are_those_of_the_layers() -> None:
    shape: dict[str, Any] = {
        "encoder_dims": (48, 24),
        "trunk_dims": (),
        "experts.dims": (16, 8),
        "experts.form": "full",
    }
    config = changed(SmesConfig(), shape)
    width = 40 * 16
    without = width * 48 + 48 * 24 + 3 * (24 * 16 + 16 * 8)
    assert gpu._multiply_adds(config, 3.0) == without
    on_encoder = replace(config, trunk_dims=(32, 8), trunk_input="encoder")
    assert gpu._multiply_adds(on_encoder, 3.0) == without + 24 * 32 + 32 * 8
    assert gpu._multiply_adds(replace(on_encoder, trunk_input="raw"), 3.0) == without + width * 32 + 32 * 8


@pytest.mark.parametrize("norm", get_args(ExpertNorm))
@pytest.mark.parametrize("trim", [True, False])
def test_the_dense_execution_gives_the_same(trim: bool, norm: ExpertNorm) -> None:
    torch.manual_seed(0)
    grouped = FullExperts(8, 16, (16, 8), norm)
    dense = gpu.DenseExperts(8, 16, (16, 8), norm)
    dense.load_state_dict(grouped.state_dict())
    h_BD = torch.randn(20, 16)
    plan = dispatch(route(torch.randn(20, 3, 8), torch.full((3,), 1 / 3), 1, 2), trim=trim)
    used = int(plan.offsets_E[-1])
    torch.testing.assert_close(dense(h_BD, plan)[:used], grouped(h_BD, plan)[:used])
