"""The synthetic log against its own truth, and the properties that make it a stand-in for a real one."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from simulators.logs.reader import open_log
from simulators.synthetic import SyntheticSummary, synthesize
from simulators.world import OUTCOME_TASKS, TASK_NAMES
from smes.errors import LogError
from smes_io.schema_file import load_builtin

N = 200_003  # no multiple of the request size, nor of a chunk


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> SyntheticSummary:
    return synthesize(tmp_path_factory.mktemp("world") / "world.parquet", N, seed=11)


@pytest.fixture(scope="module")
def log(summary: SyntheticSummary) -> Any:
    return pq.read_table(summary.log)


@pytest.fixture(scope="module")
def truth(summary: SyntheticSummary) -> Any:
    return pq.read_table(summary.truth)


def column(table: Any, name: str) -> NDArray[Any]:
    values: NDArray[Any] = table.column(name).to_numpy()
    return values


def test_log_and_truth_have_a_row_for_every_impression(summary: SyntheticSummary, log: Any, truth: Any) -> None:
    assert summary.truth.name == "world.truth.parquet"
    assert summary.impressions == N
    for table in (log, truth):
        np.testing.assert_array_equal(column(table, "impression_id"), np.arange(N))
    assert truth.column_names == ["impression_id", *TASK_NAMES]
    assert sorted(p.name for p in summary.log.parent.iterdir()) == ["world.parquet", "world.truth.parquet"]


@pytest.mark.parametrize("task", TASK_NAMES)
def test_outcomes_are_calibrated_to_the_truth(log: Any, truth: Any, task: str) -> None:
    """In every tenth of the probabilities, positives are within 5 standard deviations of what they should be."""
    probability = column(truth, task).astype(np.float64)
    happened = column(log, task)
    assert 0 <= probability.min() <= probability.max() <= 1
    for rows in np.array_split(np.argsort(probability), 10):
        p = probability[rows]
        deviation = np.sqrt((p * (1 - p)).sum())
        assert abs(happened[rows].sum() - p.sum()) < 5 * deviation + 1


def test_tasks_go_from_dense_to_very_sparse(summary: SyntheticSummary, log: Any) -> None:
    rates = {task: column(log, task).mean() for task in TASK_NAMES}
    assert 0.25 < rates["click"] < 0.45
    assert rates["click"] > rates["long_view"] > rates["like"] > rates["comment"] > rates["forward"]
    assert 0.001 < rates["forward"] < 0.003
    assert summary.positives == {task: column(log, task).sum() for task in TASK_NAMES}
    for task in OUTCOME_TASKS:
        assert abs(rates[task.name] / task.rate - 1) < 0.35  # drifts around what the world was made for


def test_outcomes_depend_on_each_other_sensibly(log: Any) -> None:
    for task in OUTCOME_TASKS:
        if task.parent is not None:
            assert (column(log, task.parent)[column(log, task.name) == 1] == 1).all()
    share = column(log, "watch_time_s") / column(log, "item_duration_s")
    assert (share > 0).all()
    assert (share <= 1).all()
    assert share[column(log, "long_view") == 1].min() >= 0.69
    assert share[column(log, "click") == 0].max() <= 0.31


def test_requests_hold_distinct_items_for_one_user_at_one_time(log: Any) -> None:
    request = column(log, "request_id")
    assert np.bincount(request)[:-1].tolist() == [8] * (N // 8)
    for name in ("user_id", "event_time_ms", "tab", "device"):
        pairs = np.unique(np.stack([request, column(log, name)]), axis=1)
        assert pairs.shape[1] == request[-1] + 1, name
    shown = np.unique(np.stack([request, column(log, "item_id")]), axis=1)
    assert shown.shape[1] == N
    assert (np.diff(column(log, "event_time_ms")) >= 0).all()


def test_popularity_has_a_heavy_tail(log: Any) -> None:
    counts = np.sort(np.bincount(column(log, "item_id")))[::-1]
    counts = counts[counts > 0]
    top, bottom = counts[: len(counts) // 100].sum() / N, counts[len(counts) // 2 :].sum() / N
    assert top > 0.12
    assert bottom < 0.20
    # Zipf: between ranks 30 and 600 the log-log slope is near -1 or flatter, far from an even share's 0.
    ranks = np.arange(30, 600)
    slope = np.polyfit(np.log(ranks), np.log(counts[ranks]), 1)[0]
    assert -1.3 < slope < -0.5


def test_new_items_and_users_keep_appearing(summary: SyntheticSummary, log: Any) -> None:
    for name, at_start in (("item_id", 2000), ("user_id", 5000)):
        ids = column(log, name)
        first_seen = np.full(ids.max() + 1, N)
        np.minimum.at(first_seen, ids, np.arange(N))
        new = first_seen[at_start:]
        new = new[new < N]
        for quarter in range(4):
            assert np.count_nonzero(new // (N // 4 + 1) == quarter) > 20, (name, quarter)
    born = (np.arange(2000, column(log, "item_id").max() + 1) - 2000) * 200
    seen = np.unique(column(log, "item_id"))
    assert len(np.intersect1d(seen, np.arange(2000, 2000 + len(born)))) > 0.6 * len(born)
    assert summary.items == len(seen)
    assert summary.span_s == pytest.approx(N / 200, rel=0.05)


def test_tastes_drift(log: Any, truth: Any) -> None:
    """A segment's liking for a category changes over the log by more than chance."""
    segment, category = column(log, "user_segment"), column(log, "item_category")
    click = column(truth, "click").astype(np.float64)
    cell = segment * 24 + category
    early, late = np.arange(N) < N // 3, np.arange(N) > 2 * N // 3
    changes = []
    for c in np.unique(cell):
        a, b = click[early & (cell == c)], click[late & (cell == c)]
        if min(len(a), len(b)) > 400:
            changes.append(abs(a.mean() - b.mean()) / np.sqrt(a.var() / len(a) + b.var() / len(b)))
    assert len(changes) > 20
    assert np.mean(changes) > 2  # chance alone gives 0.8


def test_crosses_tell_more_than_single_columns(log: Any) -> None:
    """What a linear model of single fields misses: segment × category alone predicts clicks better than their sum."""
    half = N // 2
    segment, category = column(log, "user_segment"), column(log, "item_category")
    click = column(log, "click")
    cell = segment * 24 + category
    positives = np.bincount(cell[:half], click[:half], minlength=cell.max() + 1)
    crossed = (positives + 3) / (np.bincount(cell[:half], minlength=cell.max() + 1) + 10)
    one_hot = np.concatenate([np.eye(segment.max() + 1)[segment], np.eye(24)[category]], axis=1)
    linear = LogisticRegression(max_iter=500).fit(one_hot[:half], click[:half])
    alone = roc_auc_score(click[half:], linear.decision_function(one_hot[half:]))
    assert roc_auc_score(click[half:], crossed[cell[half:]]) > alone + 0.02


def test_the_latent_tastes_are_not_in_the_log(log: Any) -> None:
    assert set(log.column_names) == {
        *("impression_id", "request_id", "event_time_ms", "user_id", "item_id", "tab", "device"),
        *("user_segment", "user_age_band", "user_country", "user_interests"),
        *("item_category", "item_author", "item_tags", "item_duration_s"),
        *TASK_NAMES,
        "watch_time_s",
    }


def test_a_shorter_log_is_the_beginning_of_a_longer_one(summary: SyntheticSummary, log: Any, tmp_path: Path) -> None:
    short = synthesize(tmp_path / "short.parquet", 9_001, seed=11)
    assert pq.read_table(short.log).equals(log.slice(0, 9_001).combine_chunks())
    assert pq.read_table(short.truth).equals(pq.read_table(summary.truth).slice(0, 9_001).combine_chunks())
    other = synthesize(tmp_path / "other.parquet", 9_001, seed=12)
    assert not pq.read_table(other.log).equals(pq.read_table(short.log))


def test_the_builtin_schema_reads_it(summary: SyntheticSummary, log: Any) -> None:
    schema_file = load_builtin("synthetic")
    with open_log(summary.log, schema_file, limit=5000) as reader:
        assert (reader.rows_read, reader.duplicates, reader.rejected) == (N, 0, {})
        block = next(reader.blocks(5000))
    impressions, slices = block.impressions, schema_file.schema.id_slices
    np.testing.assert_array_equal(impressions.impression_id, np.arange(5000))
    np.testing.assert_array_equal(impressions.request_id, column(log, "request_id")[:5000])
    np.testing.assert_array_equal(
        impressions.ids[:, slices["item_tags"]], log.slice(0, 5000).column("item_tags").to_pylist()
    )
    for index, task in enumerate(schema_file.schema.tasks):
        name = "watch_time_s" if task.name == "watch_time" else task.name
        np.testing.assert_array_equal(block.outcomes[:, index], column(log, name)[:5000])
    assert np.nanmax(block.outcomes) < min(t.window_s for t in schema_file.schema.tasks)


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a file name that ends in \.parquet"):
        synthesize(tmp_path / "x.csv", 10, 0)
    with pytest.raises(ValueError, match="0 impressions with seed 0"):
        synthesize(tmp_path / "x.parquet", 0, 0)
    with pytest.raises(LogError, match=r"nowhere.*expected to be able to write"):
        synthesize(tmp_path / "nowhere" / "x.parquet", 10, 0)
