"""What a log holds beyond its ledger is counted as NumPy and scikit-learn count it; what tells a label is named."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from simulators.logs import profile as profile_module
from simulators.logs.distinct import DistinctIds
from simulators.logs.leaks import alone, auc, codes_of
from simulators.logs.profile import InputProfile, LogProfile, profile
from simulators.logs.reader import LogReader
from tests.simulators.made_logs import opened, parquet_log

N = 3000
RNG = np.random.default_rng(3)
CLICK = (RNG.random(N) < 0.3).astype(int)
STARS = np.where(RNG.random(N) < 0.4, RNG.integers(1, 6, N), np.nan)
FEATURES = (
    "{name: page}, {name: price, kind: numeric}, {name: copy, kind: numeric}, {name: after}, {name: tags, kind: bag, "
    "max_length: 3}, {name: bumps, kind: numeric}, {name: never, kind: numeric}, {name: same}"
)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clicks that three features tell: another outcome, an id that comes after, and a number without an order."""
    delay_s = RNG.exponential(20, N)
    columns = {
        "user": RNG.integers(0, 400, N),
        "item": RNG.integers(0, 90, N),
        "click": CLICK,
        "click_at": pa.array(
            [1_600_000_000 + k + d if c else None for k, (c, d) in enumerate(zip(CLICK, delay_s, strict=True))]
        ),
        "stars": pa.array(STARS, from_pandas=True),
        "page": RNG.integers(0, 7, N),
        "price": np.where(RNG.random(N) < 0.25, np.nan, RNG.normal(size=N)),
        "copy": pa.array(STARS, from_pandas=True),
        "after": np.where(CLICK > 0, RNG.integers(10, 20, N), RNG.integers(0, 10, N)),
        "tags": [[int(k) % 5, 7][: int(k) % 3] for k in RNG.integers(0, 60, N)],
        "bumps": np.where(CLICK > 0, 2 * RNG.integers(0, 8, N), 2 * RNG.integers(0, 8, N) + 1).astype(float),
        "never": np.full(N, np.nan),
        "same": np.ones(N, int),
    }
    return parquet_log(tmp_path_factory.mktemp("profile") / "log.parquet", columns)


TASKS = "tasks: [{name: click, window_s: 30}, {name: stars, kind: regression, max_value: 5, window_s: 30}]"
LABELS = "click: {column: click, time_column: click_at}, stars: {column: stars, delay: {median_s: 1, sigma: 0.5}}"


def read(log: Path) -> LogReader:
    return opened(log, tasks=TASKS, labels=LABELS, features=FEATURES)


@pytest.fixture(scope="module")
def found(log: Path) -> LogProfile:
    with read(log) as reader:
        return profile(reader)


def named(found: LogProfile) -> dict[str, InputProfile]:
    return {column.name: column for column in found.inputs}


def test_ids_and_values_are_counted(log: Path, found: LogProfile) -> None:
    with read(log) as reader:
        (block,) = reader.blocks(1 << 20)
    impressions, inputs = block.impressions, named(found)
    assert (found.impressions, found.sampled) == (N, N)
    for name, columns in reader.schema.id_slices.items():
        values = impressions.ids[:, columns]
        there = values[values >= 0]
        assert inputs[name].distinct == len(np.unique(there)) == found.vocabularies[name]
        assert inputs[name].filled == pytest.approx((values >= 0).any(axis=1).mean())
    for column, name in enumerate(("price", "copy", "bumps", "never")):
        assert inputs[name].filled == pytest.approx(np.isfinite(impressions.numerics[:, column]).mean())
        assert inputs[name].distinct is None


def test_what_tells_a_label_is_named_and_nothing_else(found: LogProfile) -> None:
    inputs = named(found)
    assert inputs["copy"].equals == "stars"
    for name in ("after", "bumps"):
        assert inputs[name].task == "click"
        assert inputs[name].auc == pytest.approx(1.0)
    for name in ("page", "price", "user_id"):
        assert inputs[name].auc == pytest.approx(0.5, abs=0.06)
    text = "\n".join(found.warnings)
    for said in (
        "feature copy equals the outcome of task stars",
        "feature after alone tells task click with an AUC of 1.000",
        "feature bumps alone tells task click",
        "feature never has no value",
        "feature same has the same value",
    ):
        assert said in text
    assert "page" not in text
    assert "price" not in text


def test_delays_stand_against_the_windows(log: Path, found: LogProfile) -> None:
    with read(log) as reader:
        (block,) = reader.blocks(1 << 20)
    assert block.outcome_time_ms is not None
    delays_s = (block.outcome_time_ms[:, 0] - block.impressions.event_time_ms)[block.outcomes[:, 0] > 0] / 1000
    click, stars = found.delays
    assert (click.logged, click.outcomes) == (True, len(delays_s))
    assert click.p50_s == pytest.approx(np.quantile(delays_s, 0.5), abs=0.01)
    assert click.p99_s == pytest.approx(np.quantile(delays_s, 0.99), abs=0.01)
    assert click.late == pytest.approx((delays_s > 30).mean())
    assert (stars.logged, stars.outcomes) == (False, int((~np.isnan(STARS)).sum()))
    assert stars.late == pytest.approx(0, abs=1e-6)
    assert f"task click: {click.late:.1%} of the delays come later than its window of 30 s" in found.warnings


def test_derived_features_are_counted_where_a_row_tells_them(log: Path) -> None:
    derive = (
        "{name: pair, kind: cross, of: [user_id, page]}, {name: band, kind: bucket, of: price, quantiles: 4}, "
        "{name: of_band, kind: cross, of: [band, page]}, {name: hour, kind: hour_of_day}, "
        "{name: leak, kind: hash, of: after, into: 1000}"
    )
    with opened(log, tasks=f"{TASKS}\nderive: [{derive}]", labels=LABELS, features=FEATURES) as reader:
        (block,) = reader.blocks(1 << 20)
        found = profile(reader)
    inputs, slices, ids = named(found), reader.schema.id_slices, block.impressions.ids
    pairs = np.stack([ids[:, slices["user_id"].start], ids[:, slices["page"].start]], axis=1)
    assert inputs["pair"].distinct == len(np.unique(pairs, axis=0)) == found.vocabularies["pair"]
    hours = np.unique(block.impressions.event_time_ms // 3_600_000)
    assert (inputs["pair"].source, inputs["hour"].distinct) == ("derived", len(hours))
    assert not {"band", "of_band"} & {*inputs}
    assert "feature leak alone tells task click with an AUC of 1.000" in "\n".join(found.warnings)


def test_a_sample_comes_from_all_over_the_log(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_module, "_SAMPLE_ROWS", 700)
    with read(log) as reader:
        blocks = [*reader.blocks(257)]
        monkeypatch.setattr(reader, "blocks", lambda: blocks)
        found = profile(reader)
    assert (found.impressions, found.sampled) == (N, -(-N // 5))
    assert found.delays[0].outcomes == int(CLICK[::5].sum())


@given(st.lists(st.tuples(st.integers(-2, 3), st.booleans()), min_size=60, max_size=200))
@settings(max_examples=25, deadline=None)
def test_auc_is_that_of_scikit_learn(rows: list[tuple[int, bool]]) -> None:
    scores, labels = np.array([r[0] for r in rows], float), np.array([r[1] for r in rows], float)
    found = auc(scores, labels)
    if min(labels.sum(), len(labels) - labels.sum()) < 20:
        assert found is None
    else:
        assert found == pytest.approx(roc_auc_score(labels, scores))


def test_an_id_that_is_new_in_each_row_tells_nothing() -> None:
    labels = (RNG.random(2000) < 0.2).astype(float)
    assert alone(codes_of(np.arange(2000)), labels) == 0.5
    wave = np.sin(np.arange(2000) / 3)
    labels = (np.abs(wave) > 0.7).astype(float)
    told = alone(codes_of(wave), labels)
    assert told is not None
    assert told > 0.95 > roc_auc_score(labels, wave)


@pytest.mark.parametrize("different", [1, 500, 16_383, 16_384, 300_000])
def test_different_ids_are_counted_in_bounded_memory(different: int) -> None:
    one, two, ids = DistinctIds(), DistinctIds(), RNG.permutation(np.arange(different) * 7 - 1000)
    for piece in np.array_split(np.concatenate([ids, ids[::-1]]), 9):
        one.add(piece)
    half = ids[: different // 2 + 1]
    two.add(half)
    two.join(one)
    for counted in (one, two):
        assert counted.count() == (different if different < 16_384 else pytest.approx(different, rel=0.03))
