"""The benchmark of delayed feedback: its figures by hand, and that no policy knows the future."""

import numpy as np
import pytest

from benchmarks.delayed_feedback import (
    DELAYS_S,
    POLICIES,
    calibration_error,
    moments,
    normalised_entropy,
    show,
)
from smes.events import CLOSING, FIRST, FURTHER, WHOLE


def test_the_error_of_the_truth_is_0_and_of_a_shift_the_shift() -> None:
    truth = np.random.default_rng(0).uniform(0.1, 0.8, 10_000)

    assert calibration_error(truth.astype(np.float32), truth) == pytest.approx(0, abs=1e-6)
    assert calibration_error((truth + 0.05).astype(np.float32), truth) == pytest.approx(0.05, abs=1e-6)


def test_the_truth_has_the_least_entropy_and_the_base_rate_1() -> None:
    truth = np.random.default_rng(0).uniform(0.1, 0.8, 10_000)
    rate = np.full(10_000, truth.mean())

    assert normalised_entropy(rate.astype(np.float32), truth) == pytest.approx(1)
    assert normalised_entropy(truth.astype(np.float32), truth) < 1
    assert normalised_entropy((truth * 0.8).astype(np.float32), truth) > normalised_entropy(
        truth.astype(np.float32), truth
    )


@pytest.mark.parametrize("name", ["window", "naive", "fnw", "es_dfm_after_15_minutes"])
def test_a_policy_trains_on_what_has_come_by_then_and_on_every_impression(name: str) -> None:
    shown = show(16_384, 0, DELAYS_S["hours"])
    came_ms = {
        (int(i), int(t)): int(ms)
        for i, t, ms in zip(
            shown.feedback.impression_id, shown.feedback.task, shown.feedback.event_time_ms, strict=True
        )
    }
    begun = 0
    for examples, batches in moments(shown, POLICIES[name]):
        now_ms = int(examples.event_time_ms[-1])
        for batch in batches:
            begun += batch.num_impressions
            assert batch.due_ms.max() < now_ms
            trained = batch.to_train_on()
            for i, t in zip(*np.nonzero(trained.labels), strict=True):
                assert came_ms[int(trained.impression_id[i]), int(t)] <= now_ms
            kinds = {WHOLE} if name == "window" else {FIRST, FURTHER, CLOSING}
            assert set(batch.kind.tolist()) <= kinds

    assert begun > (16_384 * 5 // 8 if name == "window" else 16_384 - 1024)


def test_the_oracle_knows_all_labels_at_once() -> None:
    shown = show(16_384, 0, DELAYS_S["days"])

    for examples, batches in moments(shown, POLICIES["oracle"]):
        (batch,) = batches
        assert batch is examples
