"""The quick check fails on a ratio that has fallen, in two measurements, and on none that noise moved once."""

import time
from collections.abc import Callable

import pytest

from benchmarks import quick
from benchmarks.quick import Pair, PlainMmoe, check
from benchmarks.speed_setting import Setting, make_data

Captured = pytest.CaptureFixture[str]


def busy(seconds: Callable[[], float]) -> Callable[[], None]:
    """Takes so much of the processor's time."""

    def work() -> None:
        start_s = time.process_time()
        while time.process_time() - start_s < seconds():
            pass

    return work


TWICE = {"twice": Pair(busy(lambda: 0.004), busy(lambda: 0.002), 1, 2)}


@pytest.mark.parametrize(("stored", "status"), [({"twice": 2.0}, 0), ({"twice": 2.9}, 1), ({}, 1)])
def test_a_ratio_that_has_fallen_by_more_than_a_quarter_fails(
    capsys: Captured, stored: dict[str, float], status: int
) -> None:
    assert check(TWICE, stored) == status
    told = capsys.readouterr().err
    if not stored:
        assert "twice: not in quick.json, expected a stored ratio" in told
    elif status:
        assert "of the stored 2.900, expected at least 0.75 of it" in told
    else:
        assert told == ""


def test_what_was_slow_in_one_measurement_only_is_measured_again(capsys: Captured) -> None:
    calls = [0]

    def ours() -> None:
        start_s = time.process_time()
        calls[0] += 1
        while time.process_time() - start_s < (0.004 if calls[0] <= 10 else 0.001):
            pass

    pairs = {"same": Pair(busy(lambda: 0.002), busy(lambda: 0.002)), "once": Pair(busy(lambda: 0.002), ours)}
    assert check(pairs, {"same": 1.0, "once": 2.0}) == 0
    assert calls[0] == 20, "it was measured twice, the other one once"
    assert capsys.readouterr().err == ""


def test_the_reference_learns_and_scores() -> None:
    sizes = {"num_fields": 4, "embedding_dim": 4, "num_tasks": 3, "batch_size": 64, "vocabulary": 20}
    setting = Setting(**sizes, expert_dims=(8, 8), peer_learning_rate=0.02)
    model = PlainMmoe(setting, make_data(setting))
    before = model.score()
    for _ in range(20):
        model.train_step()
    assert before.shape == (setting.candidates, 3)
    assert model.score().mean() < before.mean() - 0.05, "a tenth of the labels is positive"


def test_another_processor_is_not_compared_with(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(quick, "all_pairs", lambda log: TWICE)
    monkeypatch.setattr(quick, "processor", lambda: "another")
    assert quick.main(store=False) == 0
    assert "not compared: quick.json is of" in capsys.readouterr().out
