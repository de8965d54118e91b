"""What the benchmark of deltas counts, at a small size, on real servers."""

import argparse
from pathlib import Path

import numpy as np
import pytest

from benchmarks.deltas import measure

ROWS = 40_000


def run(*parts: str) -> dict[str, float]:
    return measure(argparse.Namespace(parts=[*parts], rows=ROWS, rounds=1, seconds=1.5, log=None, impressions=6000))


def test_a_delta_has_the_touched_rows_and_the_dense_weights() -> None:
    result = run("bytes")

    rows = result["touched_share"] * ROWS
    row_bytes = {"": 8 + 4 * 24, "_fp16": 8 + 2 * 24, "_int8": 8 + 24 + 2 * 4}
    rest = {name: result[f"delta{name}_bytes"] - rows * row_bytes[name] for name in row_bytes}
    assert result["full_bytes"] - ROWS * row_bytes[""] == pytest.approx(rest[""], rel=0.02)  # dense weights, headers
    assert max(rest.values()) - min(rest.values()) < 2000
    assert result["delta_int8_bytes_ratio"] == result["delta_int8_bytes"] / result["full_bytes"]


def test_cuts_are_timed_until_a_scorer_serves_them() -> None:
    result = run("cut", "throughput")

    assert 0 < result["stall_ms"] <= result["stall_max_ms"] < 1000 * result["cut_to_service_s"]
    assert 0 < result["full_stall_ms"] < 1000 * result["full_publish_s"]
    assert 0 < result["cut_throughput_ratio"] < 3
    assert result["published"] >= 3


def test_precisions_are_compared_on_the_same_answers(tmp_path: Path) -> None:
    result = run("precision")

    assert 0.5 < result["auc_fp32"] < 1
    assert abs(result["auc_loss_fp16"]) < abs(result["auc_loss_int8_max"]) < 0.01
    assert np.isfinite([*result.values()]).all()
