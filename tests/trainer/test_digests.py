"""The weights that a small stream gives: the same every time, by either loop, and as they were recorded.

Guarantee shown: on the recorded kind of machine, a change of the code that changes a bit of the weights is noticed.
"""

from functools import cache

import pytest
import torch

from tests.fixtures.stored import on_the_recorded_machine, recorded
from tests.trainer.digests import MODELS, train_backtest, train_from_log, weights_digest


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@cache
def of_backtest(name: str) -> str:
    return weights_digest(train_backtest(MODELS[name]))


@pytest.mark.parametrize("name", MODELS)
def test_two_runs_give_the_same_weights(name: str) -> None:
    assert weights_digest(train_backtest(MODELS[name])) == of_backtest(name)


@pytest.mark.parametrize("name", MODELS)
def test_an_event_log_gives_the_weights_of_a_backtest(name: str) -> None:
    assert weights_digest(train_from_log(MODELS[name])) == of_backtest(name)


@pytest.mark.parametrize("name", MODELS)
def test_the_weights_are_the_recorded_ones(name: str) -> None:
    weights = of_backtest(name)

    if on_the_recorded_machine():  # elsewhere the last bits may differ
        assert weights == recorded("digests")[name]
