import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from benchmarks import quality
from benchmarks.quality_config import build_config, key_of, load_quality, settings_of
from benchmarks.run_cache import RunCache, run_missing
from benchmarks.world_quality import WorldFigures, world_figures
from benchmarks.world_runs import BATCH, Stream, TruthRun, WorldRun
from benchmarks.worlds import WORLDS, World

SMALL = 24 * BATCH
COMPARED: dict[str, Any] = {
    "smes": "smes_e16",
    "paper": "paper",
    "linear": "linear",
    "dense": ["mmoe", "small"],
    "experts": {8: "smes_e8", 16: "smes_e16"},
    "common": {"optimizer.learning_rate": 0.006},
    "rankers": {
        "linear": {"settings": {"model.ranker": "linear"}},
        "mmoe": {"settings": {"model.ranker": "mmoe", "model.mmoe.num_experts": 16}},
        "small": {"settings": {"model.ranker": "shared_bottom", "model.shared_bottom.dims": [8]}},
        "smes_e16": {
            "settings": {
                "model.smes.experts.num": 16,
                "model.smes.encoder_dims": [16],
                "model.smes.trunk_dims": [8],
                "model.smes.experts.dims": [8],
            },
            "trials": [{"optimizer.learning_rate": 0.006}, {"optimizer.learning_rate": 0.0001}],
        },
        "smes_e8": {"like": "smes_e16", "settings": {"model.smes.experts.num": 8}},
        "paper": {"like": "smes_e16", "settings": {"model.smes.experts.form": "full"}},
    },
}


# A comparison is many runs: half a minute on a busy machine, all of it in the first test's fixture.
pytestmark = [pytest.mark.soak, pytest.mark.timeout(400), pytest.mark.xdist_group("world_quality")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quality")
    text = yaml.safe_dump({"worlds": COMPARED, "rare_worlds": COMPARED, "kuairand": COMPARED})
    (folder / "quality.yaml").write_text(text)
    return folder


def naive_auc(labels: NDArray[np.float32], scores: NDArray[np.float32]) -> float:
    pairs = [(p, n) for p in scores[labels == 1] for n in scores[labels == 0]]
    return float(np.mean([(p > n) + 0.5 * (p == n) for p, n in pairs]))


def run(folder: Path, *more: str) -> dict[str, Any]:
    report = folder / "figures.json"
    where = ["--config", "quality.yaml", "--chosen", "chosen.yaml", "--cache", "cache", "--json", report.name]
    where = [str(folder / word) if not word.startswith("--") else word for word in where]
    few = ["--world", "segments", "--impressions", str(SMALL), "--resamples", "50"]
    assert quality.main([*few, *where, *more]) == 0
    figures: dict[str, Any] = json.loads(report.read_text())
    return figures


@pytest.fixture(scope="module")
def figures(folder: Path) -> dict[str, Any]:
    return run(folder, "--seeds", "2")


def test_every_figure_that_is_promised(figures: dict[str, Any]) -> None:
    promised = "gain_pct gain_ci_low_pct oracle_share gain_early_pct tasks_behind gain_any_pct gain_single_pct"
    for key in promised.split():
        assert np.isfinite(figures[f"world_{key}"]), key
        assert figures[f"world_{key}"] == figures[f"segments_{key}"], "the worst of one world is that world's"
    for ranker in COMPARED["rankers"]:
        for key in ("gauc", "gauc_tenth", "gauc_third", "flops", "params", "calibration_error", "oracle_share"):
            assert np.isfinite(figures[f"segments_{ranker}_{key}"]), key
    assert figures["segments_best_dense"] == "mmoe", "the small one executes less than SMES"
    assert figures["segments_e16_gauc"] == figures["segments_smes_e16_gauc"]
    assert figures["segments_linear_oracle_share"] == 0
    assert figures["segments_linear_gauc"] < figures["segments_oracle_gauc"]


def test_learning_curves_are_plotted(figures: dict[str, Any], folder: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plots need the bench extra")
    run(folder, "--seeds", "2", "--plot", str(folder / "curves.png"))
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_gains_are_those_of_the_gaucs(figures: dict[str, Any]) -> None:
    ours, theirs = figures["segments_smes_e16_gauc"], figures["segments_mmoe_gauc"]
    assert figures["segments_gain_pct"] == pytest.approx(100 * (ours - theirs) / theirs)
    assert figures["segments_gain_ci_low_pct"] < figures["segments_gain_pct"] < figures["segments_gain_ci_high_pct"]
    floor, top = figures["segments_linear_gauc"], figures["segments_oracle_gauc"]
    assert figures["world_oracle_share"] == pytest.approx((ours - floor) / (top - floor))
    by_task = [(figures[f"segments_smes_e16_gauc_task{t}"], figures[f"segments_mmoe_gauc_task{t}"]) for t in range(8)]
    assert figures["world_tasks_behind"] == sum(a < b for a, b in by_task)
    assert figures["world_worst_task_gain"] == pytest.approx(min(a - b for a, b in by_task))
    assert ours == pytest.approx(np.mean([a for a, _ in by_task]))


def test_an_interrupted_comparison_goes_on(figures: dict[str, Any], folder: Path) -> None:
    kept = {path: path.stat().st_mtime_ns for path in (folder / "cache").iterdir()}
    (lost,) = [path for path in kept if path.name.startswith("mmoe-segments-1")]
    lost.unlink()
    assert run(folder, "--seeds", "2") == {**figures, "segments_mmoe_impressions_per_s": pytest.approx(0, abs=1e9)}
    assert {p for p in kept if p.stat().st_mtime_ns != kept[p]} == {lost}


def test_the_oracle_and_the_error_are_those_of_the_world(figures: dict[str, Any], folder: Path) -> None:
    """GAUC of the true probabilities by a loop over requests, and the mean distance of one run's scores to them."""
    blocks = list(World(WORLDS["segments"], 0).stream(SMALL, BATCH))[-6:]
    labels, truth = np.concatenate([e.labels for e, _ in blocks]), np.concatenate([p for _, p in blocks])
    per_task = []
    for t in range(8):
        requests = zip(labels[:, t].reshape(-1, 8), truth[:, t].reshape(-1, 8).astype(np.float32), strict=True)
        per_task.append(np.mean([naive_auc(y, p) for y, p in requests if 0 < y.sum() < 8]))
    assert figures["segments_oracle_gauc"] == pytest.approx(np.mean(per_task))
    config = load_quality(folder / "quality.yaml").worlds
    one = WorldRun("linear", settings_of(config, "linear", {}), Stream("segments", 0, SMALL), 0)
    scores = RunCache(folder / "cache").load(one).arrays["scores_end"]
    # The linear ranker is the same for every seed.
    assert figures["segments_linear_calibration_error"] == pytest.approx(np.abs(scores - truth).mean(), rel=1e-5)


def test_the_reference_is_chosen_by_quality_among_those_that_cost_as_much(folder: Path) -> None:
    config, cache = load_quality(folder / "quality.yaml").worlds, RunCache(folder / "cache")
    stream = Stream("segments", 0, SMALL)
    runs = [WorldRun(n, settings_of(config, n, {}), stream, s) for s in (0, 1) for n in ("smes_e16", "mmoe", "small")]
    one: WorldFigures = world_figures(runs, cache, 20)
    best = max(("mmoe", "small"), key=one.gauc["end"].mean)
    assert one.best_dense(config) == best
    assert one.best_dense(config, at_least=one.rankers["smes_e16"].cost.flops) == "mmoe"
    assert one.best_dense(config, at_least=1e12) is None


def test_tuning_takes_the_better_trial_on_another_world(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--config", str(folder / "quality.yaml"), "--chosen", str(folder / "tuned.yaml")]
    few = ["--world", "segments", "--impressions", str(SMALL), "--rankers", "smes_e16", "--tune"]
    assert quality.main([*few, *where, "--cache", str(folder / "tuning")]) == 0
    assert not [p for p in (folder / "tuning").iterdir() if "truth-segments-0-" in p.name], "looked at what is reported"
    gauc = [float(line.split("GAUC ")[1].split()[0]) for line in capsys.readouterr().out.splitlines() if "GAUC" in line]
    better = COMPARED["rankers"]["smes_e16"]["trials"][int(np.argmax(gauc))]
    assert yaml.safe_load((folder / "tuned.yaml").read_text()) == {"worlds": {"smes_e16": better}}


def test_processes_give_what_one_process_gives(figures: dict[str, Any], folder: Path) -> None:
    config = load_quality(folder / "quality.yaml").worlds
    runs = [WorldRun("small", settings_of(config, "small", {}), Stream("segments", 0, SMALL), s) for s in (0, 1)]
    one, other = RunCache(folder / "cache"), RunCache(folder / "two-processes")
    run_missing([*runs, TruthRun(runs[0].stream)], other, 2)
    for each in runs:
        np.testing.assert_array_equal(one.load(each).arrays["scores_end"], other.load(each).arrays["scores_end"])
    first, second = (other.load(each).arrays["scores_end"] for each in runs)
    assert not np.array_equal(first, second), "two seeds, one model"


def test_the_settings_of_an_ablation_are_those_of_what_it_is_like() -> None:
    config = load_quality().worlds
    chosen = {"smes_e256": {"optimizer.learning_rate": 0.5}, "smes_e16": {"optimizer.learning_rate": 0.7}}
    assert settings_of(config, "smes_e16", chosen)["optimizer.learning_rate"] == 0.5
    assert settings_of(config, "smes_e16", chosen)["model.smes.experts.num"] == 16


@pytest.mark.parametrize("which", ["worlds", "rare_worlds", "kuairand"])
def test_every_setting_and_trial_of_the_comparison_is_a_key_that_exists(which: str) -> None:
    comparison = getattr(load_quality(), which)
    for name, entry in comparison.rankers.items():
        for trial in (*entry.trials, {}):
            build_config({**settings_of(comparison, name, {}), **trial}, name)


def test_a_key_tells_configurations_apart_and_ignores_other_rankers() -> None:
    mmoe = build_config({"model.ranker": "mmoe"}, "x")
    assert key_of(mmoe) == key_of(build_config({"model.ranker": "mmoe", "model.smes.experts.num": 8}, "x"))
    assert key_of(mmoe) != key_of(build_config({"model.ranker": "mmoe", "model.mmoe.num_experts": 8}, "x"))
    assert key_of(mmoe) != key_of(build_config({"model.ranker": "mmoe", "optimizer.learning_rate": 0.1}, "x"))
    assert key_of(mmoe, seed=0) != key_of(mmoe, seed=1)


def test_what_cannot_be_done_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--world", "segments", "--cache", str(folder / "cache")]
    assert quality.main([*base, "--rankers", "nobody"]) == 2
    assert "rankers ['nobody']: expected names among" in capsys.readouterr().err
    assert quality.main([*base, "--impressions", "1000"]) == 2
    assert "impressions 1000: expected a multiple of 1024" in capsys.readouterr().err
