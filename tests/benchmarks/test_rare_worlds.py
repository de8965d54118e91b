"""The worlds with rare tasks, and what is said of rankers in them; rankers here are the truth with errors."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import quality, world_report
from benchmarks.bootstrap import GroupedAuc
from benchmarks.quality_config import Comparison, RankerEntry, load_quality, settings_of
from benchmarks.rare_worlds import RARE_WORLDS, RareWorld
from benchmarks.run_cache import RunCache, RunResult
from benchmarks.world_quality import WorldFigures, world_figures
from benchmarks.world_runs import BATCH, Stream, TruthRun, WorldRun
from benchmarks.worlds import World

F64 = NDArray[np.float64]
RARE, DENSE = [5, 6, 7], [0, 1, 2, 3, 4]
COUNT = 262_144
COMPARISON = Comparison(
    smes="ours",
    paper="linear",
    linear="linear",
    dense=("good_at_rare", "good_at_dense"),
    rankers={name: RankerEntry() for name in ("ours", "linear", "good_at_rare", "good_at_dense")},
)
ERRORS = {"ours": (0.5, 0.5), "linear": (3.0, 3.0), "good_at_rare": (2.0, 1.0), "good_at_dense": (1.0, 2.0)}
"""Deviation of the errors in the logits of a ranker's scores: of dense tasks, of rare ones."""


def sample(world: World, count: int) -> tuple[F64, F64]:
    """Labels and probabilities, [N, T] each."""
    blocks = list(world.stream(count, 16_384))
    return np.concatenate([e.labels for e, _ in blocks]), np.concatenate([p for _, p in blocks])


@pytest.fixture(scope="module", params=RARE_WORLDS)
def drawn(request: pytest.FixtureRequest) -> tuple[str, F64, F64]:
    """The world's name, labels and probabilities."""
    return (request.param, *sample(RareWorld(RARE_WORLDS[request.param], 7), COUNT))


def test_positives_are_as_rare_as_the_world_says(drawn: tuple[str, F64, F64]) -> None:
    name, labels_NT, truth_NT = drawn
    rates = np.array(RARE_WORLDS[name].rates)
    assert (rates[0], rates[-1]) == (pytest.approx(0.45), pytest.approx(0.001))
    assert np.diff(np.log(rates)) == pytest.approx(np.log(0.001 / 0.45) / 7), "they fall geometrically"
    np.testing.assert_allclose(truth_NT.mean(axis=0), rates, rtol=0.08)
    error_T = np.sqrt(truth_NT.mean(axis=0) / COUNT)
    assert (np.abs(labels_NT.mean(axis=0) - truth_NT.mean(axis=0)) < 4 * error_T).all()


def test_labels_are_drawn_with_the_probabilities_that_are_given(drawn: tuple[str, F64, F64]) -> None:
    """In each fifth of the instances, by probability, there are as many positives as it says."""
    _, labels_NT, truth_NT = drawn
    for t in range(labels_NT.shape[1]):
        for rows in np.array_split(np.argsort(truth_NT[:, t]), 5):
            expected = truth_NT[rows, t].sum()
            assert abs(labels_NT[rows, t].sum() - expected) < 4.5 * np.sqrt(expected) + 1


def test_the_true_probabilities_rank_well_but_not_perfectly(drawn: tuple[str, F64, F64]) -> None:
    _, labels_NT, truth_NT = drawn
    request_N = np.arange(len(labels_NT)) // 8
    gauc_T = GroupedAuc.of(request_N, request_N, truth_NT, labels_NT.astype(np.float32)).by_user().gauc_T
    assert ((gauc_T > 0.75) & (gauc_T < 0.95)).all()


def test_tasks_of_a_side_agree_and_those_of_two_sides_do_not() -> None:
    def agreement(name: str) -> F64:
        _, truth_NT = sample(RareWorld(RARE_WORLDS[name], 3), 65_536)
        matrix: F64 = np.corrcoef(np.log(truth_NT / (1 - truth_NT)).T)
        return matrix

    shared, conflict = agreement("rare_shared"), agreement("rare_conflict")
    other_side = np.add.outer(range(8), range(8)) % 2 == 1
    assert (conflict[other_side] < 0.3).all(), "popularity is all that they have in common"
    assert (conflict[~other_side] > 0.3).all()
    assert (shared > 0.3).all()


def test_what_needs_another_task_is_never_positive_without_it() -> None:
    spec = RARE_WORLDS["rare_nested"]
    labels_NT, truth_NT = sample(RareWorld(spec, 7), COUNT)
    assert set(spec.needs) & set(RARE), "a rare task is nested"
    assert set(RARE) - set(spec.needs), "and one is not"
    for task, needed in spec.needs.items():
        assert needed not in spec.needs
        assert spec.rates[needed] > spec.rates[task]
        assert labels_NT[:, task].sum() > 0
        assert labels_NT[labels_NT[:, needed] == 0, task].sum() == 0
        assert (truth_NT[:, task] < truth_NT[:, needed]).all()
    free = [t for t in range(1, 8) if t not in spec.needs]
    for dense, rare in pairwise(free):
        assert labels_NT[labels_NT[:, dense] == 0, rare].sum() > 0


def test_a_seed_decides_everything() -> None:
    first, again, other = (sample(RareWorld(RARE_WORLDS["rare_nested"], seed), 16_384) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


def test_early_parts_are_wide_enough_for_positives() -> None:
    stream = Stream("rare_shared", 0, 2_097_152)
    for part in ("tenth", "third", "end"):
        first, last = stream.rows(part)
        assert (last - first) * min(stream.rates) > 200
    assert stream.rare_tasks == RARE
    assert Stream("segments", 0, 65_536).rare_tasks == []


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> RunCache:
    """With runs of two worlds, their scores being the truth with errors."""
    cache = RunCache(tmp_path_factory.mktemp("rare"))
    for world in ("rare_shared", "rare_nested"):
        stream = Stream(world, 1, 128 * BATCH)
        truth_run = TruthRun(stream)
        truth = truth_run.execute(cache)
        cache.save(truth_run, truth)
        for number, (name, (dense, rare)) in enumerate(ERRORS.items()):
            rng = np.random.default_rng([number, len(world)])
            deviation_T = np.where(np.isin(np.arange(8), RARE), rare, dense)
            arrays = {"curve_P2T": truth.arrays["curve_P2T"]}
            for part in ("tenth", "third", "end"):
                p_NT = truth.arrays[f"truth_{part}"].astype(np.float64)
                logits_NT = np.log(p_NT / (1 - p_NT)) + deviation_T * rng.normal(size=p_NT.shape)
                arrays[f"scores_{part}"] = (1 / (1 + np.exp(-logits_NT))).astype(np.float32)
            flops = {"ours": 100.0, "good_at_rare": 50.0}.get(name, 200.0)
            cost = {"flops": flops, "ranker": flops, "parameters": 1, "active_parameters": 1.0, "active_experts": None}
            cache.save(WorldRun(name, {}, stream, 0), RunResult(arrays, {**cost, "seconds": 1.0}))
    return cache


@pytest.fixture(scope="module")
def worlds(cache: RunCache) -> list[WorldFigures]:
    streams = [Stream(world, 1, 128 * BATCH) for world in ("rare_shared", "rare_nested")]
    return [world_figures([WorldRun(n, {}, stream, 0) for n in ERRORS], cache, 100) for stream in streams]


@pytest.fixture(scope="module")
def flat(worlds: list[WorldFigures]) -> world_report.Flat:
    return world_report.flat_figures(COMPARISON, worlds, 1)


def number(flat: world_report.Flat, key: str) -> float:
    value = flat[key]
    assert isinstance(value, float), key
    return value


def test_the_rival_is_the_one_that_is_best_at_these_tasks_whatever_it_costs(flat: world_report.Flat) -> None:
    for world in ("rare_shared", "rare_nested"):
        assert flat[f"{world}_rare_best_dense"] == "good_at_rare", "it executes less than ours"
        assert flat[f"{world}_dense_best_dense"] == "good_at_dense"
        for group, tasks, rival in (("rare", RARE, "good_at_rare"), ("dense", DENSE, "good_at_dense")):
            ours, theirs = (
                np.mean([number(flat, f"{world}_{name}_gauc_task{t}") for t in tasks]) for name in ("ours", rival)
            )
            assert flat[f"{world}_{group}_gain_pct"] == pytest.approx(100 * (ours / theirs - 1))
            assert flat[f"{world}_ours_{group}_gauc"] == pytest.approx(ours)
            low, high = (number(flat, f"{world}_{group}_gain_ci_{side}_pct") for side in ("low", "high"))
            assert low < number(flat, f"{world}_{group}_gain_pct") < high


def test_over_all_worlds_the_lowest_counts(flat: world_report.Flat) -> None:
    for key in ("gain_pct", "gain_ci_low_pct", "gain_ci_high_pct", "gain_single_pct"):
        for group in ("rare", "dense"):
            each = [number(flat, f"{world}_{group}_{key}") for world in ("rare_shared", "rare_nested")]
            assert flat[f"{group}_world_{key}"] == min(each)
    early = [
        number(flat, f"{world}_ours_rare_gauc_{part}") - number(flat, f"{world}_good_at_rare_rare_gauc_{part}")
        for world in ("rare_shared", "rare_nested")
        for part in ("tenth", "third")
    ]
    assert flat["rare_gain_early"] == pytest.approx(min(early)), "a difference of GAUC"
    assert flat["rare_gain_early"] == min(number(flat, "rare_gain_tenth"), number(flat, "rare_gain_third"))
    assert not [key for key in flat if key.startswith("world_")], "those are of the worlds without rare tasks"


def test_auc_and_entropy_of_each_task(flat: world_report.Flat, cache: RunCache) -> None:
    stream = Stream("rare_nested", 1, 128 * BATCH)
    truth, ours = cache.load(TruthRun(stream)), cache.load(WorldRun("ours", {}, stream, 0))
    labels_N, p_N = truth.arrays["labels_end"][:, 6], ours.arrays["scores_end"][:, 6].astype(np.float64)
    above = p_N[labels_N == 1][:, None] - p_N[labels_N == 0]
    assert flat["rare_nested_ours_auc_task6"] == pytest.approx(((above > 0) + 0.5 * (above == 0)).mean(), abs=1e-3)
    rate = labels_N.mean()
    loss = -np.where(labels_N == 1, np.log(p_N), np.log1p(-p_N)).mean()
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
    assert flat["rare_nested_ours_ne_task6"] == pytest.approx(loss / entropy, rel=1e-5)
    mean = np.mean([number(flat, f"rare_nested_ours_auc_task{t}") for t in RARE])
    assert flat["rare_nested_ours_rare_auc"] == pytest.approx(mean)
    assert number(flat, "rare_nested_oracle_rare_auc") > number(flat, "rare_nested_ours_rare_auc")


def test_the_tables_have_every_ranker_and_task(worlds: list[WorldFigures]) -> None:
    text = world_report.markdown(COMPARISON, worlds[0])
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert len({line.count("|") for line in table}) == 1
        assert [line.split("|")[1].strip() for line in table[2:]] == [*(f"`{name}`" for name in ERRORS), "oracle"]


def test_a_task_without_positives_leaves_the_figure_undefined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--cache", str(tmp_path / "cache"), "--json", str(tmp_path / "x.json"), "--chosen", str(tmp_path / "no")]
    few = ["--world", "rare_shared", "--impressions", str(16 * BATCH), "--seeds", "1", "--resamples", "10"]
    assert quality.main([*few, *where, "--rankers", "linear,smes_default"]) == 0
    figures = json.loads((tmp_path / "x.json").read_text())
    truth = RunCache(tmp_path / "cache").load(TruthRun(Stream("rare_shared", 0, 16 * BATCH)))
    for part, key in (("end", "rare_gauc"), ("tenth", "rare_gauc_tenth"), ("third", "rare_gauc_third")):
        defined = truth.arrays[f"labels_{part}"][:, RARE].any(axis=0).all()
        assert (figures[f"rare_shared_linear_{key}"] is not None) == defined
    assert figures["rare_shared_linear_rare_gauc_tenth"] is None, "1,600 impressions"


def test_groups_are_declared_where_the_world_has_them() -> None:
    comparison = load_quality().rare_worlds
    for world, spec in RARE_WORLDS.items():
        declared = settings_of(comparison, comparison.smes, {}, world).get("model.smes.groups.declared", {})
        of_category = {f"task{t}" for t in spec.by_category}
        assert (of_category in [set(names) for names in declared.values()]) == bool(of_category)
    assert "model.smes.groups.declared" not in settings_of(comparison, comparison.smes, {})
