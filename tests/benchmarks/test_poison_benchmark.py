"""The poison benchmark: poisons change what they say and nothing else; its figures are of the version in service."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.poison import figures, losses, measure, table
from benchmarks.poison_runs import LEFT_OUT, POISONS, CleanLog, Served, Setting, expected_auc
from benchmarks.poison_streams import FAR, FIRST_FLOOD_ID, OneUsersClicks, Part, Poison, PoisonedStream
from simulators.synthetic import synthesize
from smes.events import ExampleBlock
from smes.schema import MISSING

IMPRESSIONS = 6000


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    torch.set_num_threads(1)
    log = tmp_path_factory.mktemp("poison") / "world.parquet"
    synthesize(log, IMPRESSIONS, 0)
    return Setting(log, IMPRESSIONS, begin=0.5, share=0.2, look_every=1024, looked_at=1024, fewest_positives=5)


@pytest.fixture(scope="module")
def clean(setting: Setting) -> CleanLog:
    return CleanLog(setting)


def _poisoned(setting: Setting, poison: Poison | None) -> tuple[list[ExampleBlock], PoisonedStream]:
    config = setting.config("none")
    stream = PoisonedStream(setting.schema, config.stream.join, config.stream.batch, setting.blocks(), poison)
    batches = []
    while not stream.ended:
        stream.poll(0)
        while (upcoming := stream.upcoming()) is not None:
            batch = stream.next_batch()
            assert batch is upcoming
            batches.append(batch)
    return batches, stream


def test_labels_are_weighed_by_their_probabilities() -> None:
    rng = np.random.default_rng(0)
    scores, truth = rng.integers(0, 20, 60).astype(np.float32), rng.random(60).astype(np.float32)
    above = total = 0.0
    for i in range(60):
        for j in range(60):
            weight = float(truth[i]) * (1 - float(truth[j]))
            total += weight
            above += weight * (1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0)

    assert expected_auc(scores, truth) == pytest.approx(above / total, abs=1e-9)
    labels = (truth > 0.5).astype(np.float32)
    assert expected_auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)


def test_the_clean_log_has_its_truth_beside_it(setting: Setting, clean: CleanLog) -> None:
    assert len(clean.examples) == IMPRESSIONS
    for t, task in enumerate(clean.tasks[:2]):  # the dense ones
        labels, truth = clean.examples.labels[:, task], clean.truth_NT[:, t]
        assert labels.mean() == pytest.approx(truth.mean(), abs=0.02)
        assert roc_auc_score(labels, truth) > 0.7


def test_flipped_labels_are_those_of_the_stretch_and_of_binary_tasks(setting: Setting, clean: CleanLog) -> None:
    batches, stream = _poisoned(setting, setting.poison("flips in a row", clean))
    got, was = ExampleBlock.concat(batches), clean.examples
    stretch = (was.impression_id >= 3000) & (was.impression_id < 4200)
    regression = setting.schema.task_index["watch_time"]

    assert stream.taken == IMPRESSIONS
    assert np.array_equal(got.impression_id, was.impression_id)
    assert np.array_equal(got.labels[~stretch], was.labels[~stretch])
    assert np.array_equal(got.labels[:, regression], was.labels[:, regression])
    assert np.array_equal(got.labels[stretch][:, clean.tasks], 1 - was.labels[stretch][:, clean.tasks])


def test_flips_throughout_are_a_share_of_what_comes_after_the_beginning(setting: Setting, clean: CleanLog) -> None:
    batches, _ = _poisoned(setting, setting.poison("flips throughout", clean))
    got, was = ExampleBlock.concat(batches), clean.examples
    flipped = (got.labels != was.labels).any(axis=1)

    assert not flipped[was.impression_id < 3000].any()
    assert flipped[was.impression_id >= 3000].mean() == pytest.approx(0.2, abs=0.03)


def test_a_stretch_left_out_has_no_weight(setting: Setting, clean: CleanLog) -> None:
    batches, stream = _poisoned(setting, setting.poison(LEFT_OUT, clean))
    got, was = ExampleBlock.concat(batches), clean.examples

    assert stream.taken == IMPRESSIONS
    assert np.array_equal(got.weight == 0, (was.impression_id >= 3000) & (was.impression_id < 4200))
    assert np.array_equal(got.labels, was.labels)


def test_far_values_are_in_the_share_and_labels_stay(setting: Setting, clean: CleanLog) -> None:
    batches, _ = _poisoned(setting, setting.poison("values of 1e30", clean))
    got, was = ExampleBlock.concat(batches), clean.examples
    far = got.numerics[:, 0] == np.float32(FAR)

    assert far[was.impression_id >= 3000].mean() == pytest.approx(0.2, abs=0.03)
    assert not far[was.impression_id < 3000].any()
    assert np.array_equal(got.labels, was.labels)
    assert np.array_equal(got.numerics[~far], was.numerics[~far])


def test_one_users_clicks_come_for_everyone_and_for_the_user(setting: Setting, clean: CleanLog) -> None:
    poison = setting.poison("one user's clicks", clean)
    assert isinstance(poison, OneUsersClicks)
    batches, stream = _poisoned(setting, poison)
    got, click = ExampleBlock.concat(batches), setting.schema.task_index["click"]
    added = got.take(got.impression_id >= FIRST_FLOOD_ID)
    shown = got.take((got.impression_id >= 3000) & (got.impression_id < 4200))

    assert stream.taken == IMPRESSIONS
    assert max(map(len, batches)) == 256
    assert len(added) == len(shown) == 1200
    assert (shown.labels[:, click] == 1).all()
    assert (added.labels.sum(axis=1) == 1).all()
    assert (added.labels[:, click] == 1).all()
    assert np.array_equal(np.sort(added.ids[:, 1]), np.sort(shown.ids[:, 1]))
    assert (added.user_id == clean.examples.user_id[0]).all()
    assert (added.request_id == MISSING).all()
    segment = setting.schema.id_slices["user_segment"]
    assert (added.ids[:, segment] == clean.examples.ids[0, segment]).all()


def test_a_poisoned_stream_without_poison_is_the_log(setting: Setting, clean: CleanLog) -> None:
    batches, _ = _poisoned(setting, None)

    assert len(batches[0]) == 256
    assert np.array_equal(ExampleBlock.concat(batches).labels, clean.examples.labels)


def test_parts_are_shares_of_what_lies_between() -> None:
    numbers = np.arange(50_000)
    chosen = Part(10_000, 40_000, 0.1).of(numbers)

    assert not chosen[:10_000].any()
    assert not chosen[40_000:].any()
    assert chosen[10_000:40_000].mean() == pytest.approx(0.1, abs=0.006)
    assert Part(10, 20).of(numbers).sum() == 10
    assert np.flatnonzero(Part(10, 12, period=7).of(numbers[:30])).tolist() == [10, 11, 17, 18, 24, 25]


def test_bursts_are_as_much_poison_in_equal_stretches(setting: Setting, clean: CleanLog) -> None:
    batches, _ = _poisoned(setting, replace(setting, bursts=3).poison("flips in a row", clean))
    got, was = ExampleBlock.concat(batches), clean.examples
    flipped = np.sort(was.impression_id[(got.labels != was.labels).any(axis=1)])

    assert flipped.tolist() == [*range(3000, 3400), *range(4000, 4400), *range(5000, 5400)]


def test_poison_lowers_the_auc_of_what_is_served_and_the_figures_say_by_how_much(setting: Setting) -> None:
    runs = measure(setting, ["flips in a row"], ["none", "go_back"])
    unpoisoned, poisoned = runs["nothing", "none"], runs["flips in a row", "none"]
    before = [at < 3000 for at in unpoisoned.at]
    loss = losses(unpoisoned, poisoned)

    assert unpoisoned.facts["published"] == 24
    assert unpoisoned.facts["refused"] == 0
    assert max(unpoisoned.behind) == 0
    assert np.nanmax(np.abs(loss[before])) == 0
    assert np.nanmax(loss) > 0.02
    stretch = [3000 <= at <= 4200 for at in unpoisoned.at]
    assert (np.isfinite(unpoisoned.old_auc).any(axis=1) == stretch).all()
    assert np.nanmax(unpoisoned.old_auc - unpoisoned.auc) < 0.05  # weights of then, and not of later
    flat = figures(runs)
    assert flat["served_auc_loss_of_age"] == np.nanmax(unpoisoned.auc - unpoisoned.old_auc) > 0
    assert flat["served_auc_loss_without_gate"] == flat["served_auc_loss_flips_in_a_row_none"] == np.nanmax(loss)
    assert flat["served_auc_loss"] == flat["served_auc_loss_flips_in_a_row_go_back"]
    left_out = losses(unpoisoned, runs[LEFT_OUT, "none"])
    assert np.nanmax(np.abs(left_out[before])) == 0
    assert flat["served_auc_loss_left_out"] == np.nanmax(left_out) > 0
    gated = runs["flips in a row", "go_back"].facts
    assert gated["published"] + gated["refused"] == gated["steps"]
    assert f"| flips in a row | none | {np.nanmax(loss):.4f} |" in table(runs)


def test_runs_that_were_looked_at_elsewhere_are_not_compared() -> None:
    one, other = (Served([at], np.zeros((1, 7)), np.zeros((1, 7)), [0], {}) for at in (256, 512))

    with pytest.raises(ValueError, match="points"):
        losses(one, other)


def test_an_unknown_poison_is_refused(setting: Setting, clean: CleanLog) -> None:
    assert all(name == "nothing" or setting.poison(name, clean) for name in POISONS)
    with pytest.raises(ValueError, match="poison 'arsenic', expected one of nothing, flips in a row"):
        setting.poison("arsenic", clean)
