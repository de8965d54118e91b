"""A small comparison on a KuaiRand folder, cut from the real one, from end to end."""

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks import quality
from benchmarks.kuairand_quality import LogFigures, log_figures
from benchmarks.kuairand_runs import LogRun, impressions_before
from benchmarks.kuairand_tuning import trial_figures
from benchmarks.quality_config import QualityConfig, load_quality, settings_of
from benchmarks.run_cache import RunCache, run_missing
from smes_cli.config import Config

DAY_MS = 86_400_000
DENSE = ("click", "long_view", "like", "profile_enter")
RARE = ("comment", "follow", "forward", "hate")
TASKS = (*DENSE, *RARE)  # in the order of the schema
COMPARED: dict[str, Any] = {
    "smes": "smes",
    "paper": "smes",
    "linear": "linear",
    "dense": ["shared_bottom"],
    "rankers": {
        "linear": {"settings": {"model.ranker": "linear"}},
        "shared_bottom": {"settings": {"model.ranker": "shared_bottom", "model.shared_bottom.dims": [16]}},
        "smes": {
            "settings": {
                "model.smes.encoder_dims": [16],
                "model.smes.trunk_dims": [8],
                "model.smes.experts.dims": [8],
            },
            "trials": [{"optimizer.learning_rate": 0.00001}, {"optimizer.learning_rate": 0.002}],
        },
    },
}

# A comparison is many runs: a minute on a busy machine, all of it in the first test's fixture.
pytestmark = [
    pytest.mark.soak,
    pytest.mark.kuairand,
    pytest.mark.timeout(400),
    pytest.mark.xdist_group("kuairand_quality"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, kuairand_dir: Path) -> Path:
    """Three users in a hundred over all days, and the feature files as they are."""
    folder = tmp_path_factory.mktemp("log-quality")
    (folder / "log").mkdir()
    for path in kuairand_dir.glob("*_features_*.csv"):
        shutil.copy(path, folder / "log")
    (log,) = kuairand_dir.glob("log_standard_*.csv")
    with log.open() as lines, (folder / "log" / log.name).open("w") as out:
        out.write(next(lines))
        out.writelines(line for line in lines if int(line.split(",", 1)[0]) % 100 < 3)
    (folder / "quality.yaml").write_text(yaml.safe_dump({field.name: COMPARED for field in fields(QualityConfig)}))
    return folder


def run(folder: Path, *more: str) -> dict[str, Any]:
    report = folder / "figures.json"
    where = {"--config": "quality.yaml", "--chosen": "chosen.yaml", "--cache": "cache", "--log": "log"}
    places = [word for option, name in where.items() for word in (option, str(folder / name))]
    assert quality.main([*places, "--seeds", "2", "--resamples", "50", "--json", str(report), *more]) == 0
    figures: dict[str, Any] = json.loads(report.read_text())
    return figures


@pytest.fixture(scope="module")
def figures(folder: Path) -> dict[str, Any]:
    return run(folder)


def runs(folder: Path, name: str) -> list[LogRun]:
    config = load_quality(folder / "quality.yaml").kuairand
    return [LogRun(name, settings_of(config, name, {}), folder / "log", None, seed) for seed in (0, 1)]


def test_every_figure_that_is_promised(figures: dict[str, Any]) -> None:
    promised = "gain_vs_best_dense_pct gain_vs_best_dense_ci_low_pct smes_flops best_dense_flops gain_vs_linear_pct"
    promised += " rare_auc_gain rare_auc_gain_ci_low rare_auc_gain_ci_high like_auc_gain like_auc_gain_ci_low"
    promised += " click_long_view_auc_gain dense_gauc_gain rare_ne_gain rare_auc_gain_vs_linear"
    for key in (*promised.split(), "auc_like_gain_vs_linear", "auc_click_gain_vs_best_dense"):
        assert np.isfinite(figures[key]), key
    assert figures["dense_tasks"] == ",".join(DENSE)
    assert figures["rare_tasks"] == ",".join(RARE)
    assert figures["rare_best_dense"] == "shared_bottom"
    assert figures["seeds"] == 2
    assert figures["best_dense"] == "shared_bottom"
    for name in COMPARED["rankers"]:
        by_task = [f"{figure}_{task}" for figure in ("auc", "ne", "gauc") for task in TASKS]
        for key in ("gauc", "gauc_single", "rare_auc", "rare_gauc", "rare_ne", "flops", "params", *by_task):
            assert np.isfinite(figures[f"{name}_{key}"]), key
    expected = 100 * (figures["smes_gauc"] / figures["shared_bottom_gauc"] - 1)
    assert figures["gain_vs_best_dense_pct"] == pytest.approx(expected)
    assert figures["gain_vs_best_dense_ci_low_pct"] < expected < figures["gain_vs_best_dense_ci_high_pct"]
    rare_gain = figures["smes_rare_auc"] - figures["shared_bottom_rare_auc"]
    assert figures["rare_auc_gain"] == pytest.approx(rare_gain)
    assert figures["rare_auc_gain_ci_low"] < rare_gain < figures["rare_auc_gain_ci_high"]


def test_a_seed_by_itself_has_the_gauc_that_smes_backtest_reports(figures: dict[str, Any], folder: Path) -> None:
    cache = RunCache(folder / "cache")
    own: LogFigures = log_figures(runs(folder, "smes"), cache, 10)
    for seed, one in enumerate(runs(folder, "smes")):
        reported = cache.load(one).facts["tasks"]
        expected = [reported[task]["gauc_windowed"] for task in TASKS]
        np.testing.assert_allclose(own.rankers["smes"].gauc_KT[seed], expected, rtol=1e-12)
    gauc_KT = own.rankers["smes"].gauc_KT
    assert figures["smes_gauc_single"] == pytest.approx(gauc_KT[:, : len(DENSE)].mean())
    assert not np.array_equal(*gauc_KT), "two seeds, one model"


def test_progressive_figures_are_those_that_smes_backtest_reports(figures: dict[str, Any], folder: Path) -> None:
    """The report's AUC is of a histogram of logits; ours is exact."""
    reported = [RunCache(folder / "cache").load(one).facts["tasks"] for one in runs(folder, "smes")]
    for task in TASKS:
        assert figures[f"{task}_positives"] == reported[0][task]["positives"]
        auc, ne = (np.mean([one[task][key] for one in reported]) for key in ("auc", "ne"))
        assert figures[f"smes_auc_{task}"] == pytest.approx(auc, abs=2e-3)
        assert figures[f"smes_ne_{task}"] == pytest.approx(ne, rel=1e-6)
    assert figures["smes_rare_auc"] == pytest.approx(np.mean([figures[f"smes_auc_{task}"] for task in RARE]))


def test_both_scores_of_every_example_are_kept(figures: dict[str, Any], folder: Path) -> None:
    columns = runs(folder, "smes")[0].columns(RunCache(folder / "cache"))
    assert len(columns.user) == figures["impressions"]
    assert columns.frozen.shape == columns.progressive.shape == columns.labels.shape == (len(columns.user), len(TASKS))
    first = slice(0, 8)  # within the first batch, before any step: both scores are of the same weights
    np.testing.assert_allclose(columns.progressive[first], columns.frozen[first], rtol=1e-4)
    later = slice(512, None)
    assert (np.abs(columns.progressive[later] / columns.frozen[later] - 1).max(axis=0) > 0.1).all()
    assert next(rows.start for rows in columns.windows()) == int((columns.window == 0).sum()) > 0


def test_the_averaged_figure_is_of_averaged_scores(figures: dict[str, Any], folder: Path) -> None:
    """One task by a loop over groups, from the columns on disk."""
    cache = RunCache(folder / "cache")
    one, other = (each.columns(cache) for each in runs(folder, "smes"))
    scores = (one.frozen[:, 0].astype(np.float64) + other.frozen[:, 0]) / 2
    weighted = weight = 0.0
    counted = one.window > 0
    for group in np.unique(np.stack([one.window, one.group])[:, counted], axis=1).T:
        rows = (one.window == group[0]) & (one.group == group[1]) & (one.labels[:, 0] < 2)
        positive = one.labels[rows, 0] == 1
        if positive.any() and not positive.all():
            pairs = scores[rows][positive][:, None] - scores[rows][~positive]
            weighted += rows.sum() * float(((pairs > 0) + 0.5 * (pairs == 0)).mean())
            weight += rows.sum()
    assert figures["smes_gauc_click"] == pytest.approx(weighted / weight, rel=1e-12)


def test_an_interrupted_comparison_goes_on(figures: dict[str, Any], folder: Path) -> None:
    (lost,) = (folder / "cache").glob("smes-log-1-*.npz")
    kept = {path.name: path.stat().st_mtime_ns for path in (folder / "cache").glob("*.npz") if path != lost}
    lost.unlink()
    again = run(folder)
    assert {key: again[key] for key in again if "per_s" not in key} == {
        key: figures[key] for key in figures if "per_s" not in key
    }
    assert kept == {p.name: p.stat().st_mtime_ns for p in (folder / "cache").glob("*.npz") if p != lost}


def test_the_comparison_is_plotted(figures: dict[str, Any], folder: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plots need the bench extra")
    run(folder, "--plot", str(folder / "figures.png"))
    assert (folder / "figures.png").read_bytes().startswith(b"\x89PNG")


def test_tuning_sees_the_first_seven_days_only(folder: Path) -> None:
    """No run trains on more, and so none scores more, than the impressions of these days."""
    limit = impressions_before(Config(), folder / "log", 7)
    (log,) = (folder / "log").glob("log_standard_*.csv")
    header, *rows = [line.split(",") for line in log.read_text().splitlines()]
    time_column = header.index("time_ms")
    times = np.array(sorted(int(row[time_column]) for row in {tuple(row) for row in rows}))
    assert limit == int((times < times[0] + 7 * DAY_MS).sum())
    assert 0 < limit < len(times)
    few = ["--rankers", "smes", "--tune", "--seeds", "1"]
    where = ["--config", str(folder / "quality.yaml"), "--log", str(folder / "log")]
    assert quality.main([*few, *where, "--cache", str(folder / "tune"), "--chosen", str(folder / "tuned.yaml")]) == 0
    cache = RunCache(folder / "tune")
    trained = [json.loads(str(np.load(path)["facts"]))["trained"] for path in cache.folder.glob("*.npz")]
    assert trained == [limit, limit]
    chosen = yaml.safe_load((folder / "tuned.yaml").read_text())
    assert chosen["kuairand"]["smes"] in COMPARED["rankers"]["smes"]["trials"]


def test_a_trial_is_judged_by_both_headlines(figures: dict[str, Any], folder: Path) -> None:
    cache = RunCache(folder / "cache")
    both = [cache.load(one).facts["tasks"] for one in runs(folder, "smes")]
    trial = trial_figures(runs(folder, "smes"), cache)
    assert trial.dense == pytest.approx(np.mean([one[task]["gauc_windowed"] for one in both for task in DENSE]))
    assert trial.rare == pytest.approx(np.mean([one[task]["auc"] for one in both for task in RARE]))
    assert trial.total == trial.dense + trial.rare


def test_a_broken_run_leaves_nothing_that_looks_whole(folder: Path, tmp_path: Path) -> None:
    config = load_quality(folder / "quality.yaml").kuairand
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "log_standard_1_pure.csv").write_text("user_id,video_id\n")
    broken = LogRun("smes", settings_of(config, "smes", {}), tmp_path / "log", None, 0)
    cache = RunCache(tmp_path / "cache")
    with pytest.raises(Exception, match="log_standard_1_pure"):
        run_missing([broken], cache, 1)
    assert not cache.has(broken)
    assert list(cache.folder.iterdir()) == []


def test_without_a_log_it_says_what_it_wants(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KUAIRAND_HOME", raising=False)
    assert quality.main(["--cache", str(folder / "cache")]) == 2
    assert "expected a KuaiRand folder, named here or by KUAIRAND_HOME" in capsys.readouterr().err
