"""A step for which what a request's examples share is computed once is the step on each example by itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smes.events import ExampleBlock
from smes.model.config import ModelConfig, OptimizerConfig, RankerName
from smes.model.learner import Learner
from smes.model.request_split import Splits, first_of_requests
from smes.rankers.ranker import RunningMoments
from smes.rankers.ranker_input import RequestRows, SplitInput
from smes.rankers.split_read import read_split
from smes.schema import MISSING
from tests.smes.test_once_per_request import HISTORY, IDS, NUMBERS, SCHEMA, rows

N = 48
STARTS = np.array([0, 7, 8, 20, 31])
CASES = {
    "items differ": {"user_id", "city", "age", "hour", *HISTORY},
    "all but one": {*IDS, *NUMBERS} - {"tags"},
    "everything": {*IDS, *NUMBERS},
}


def blocks(shared: set[str], *, apart: bool, batches: int = 6) -> list[ExampleBlock]:
    """The same examples, of requests or each of its own."""
    made = []
    for seed in range(batches):
        ids, numerics = rows(shared, STARTS, seed, N)
        rng = np.random.default_rng(seed)
        labels = ((rng.random((N, 2)) < 0.5) * np.array([1, 40])).astype(np.float32)
        request = np.arange(N) if apart else np.searchsorted(STARTS, np.arange(N), side="right")
        block = replace(ExampleBlock.empty(SCHEMA, N), ids=ids, numerics=numerics, labels=labels, request_id=request)
        made.append(replace(block, label_mask=np.ones((N, 2), np.bool_), event_time_ms=np.arange(N)))
    return made


def new_learner(ranker: RankerName = "smes") -> Learner:
    """With the default configuration of its ranker; it takes every split, however little that spares."""
    learner = Learner(SCHEMA, ModelConfig(ranker), OptimizerConfig(), device=torch.device("cpu"))
    learner._splits = Splits(SCHEMA, learner.config.table_dim, training=True, least_saved=1)
    return learner


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_on_each_example_by_itself(case: str) -> None:
    together, alone = new_learner(), new_learner()
    for block, apart in zip(blocks(CASES[case], apart=False), blocks(CASES[case], apart=True), strict=True):
        batch, single = together.prepare(block), alone.prepare(apart)
        assert batch.requests is not None
        assert single.requests is None
        got, expected = together.step(batch), alone.step(single)
        torch.testing.assert_close(got.scores, expected.scores, rtol=1e-4, atol=1e-5)
    got_state, expected_state = together.state(), alone.state()
    assert set(got_state) == set(expected_state)
    for name, tensor in expected_state.items():
        if name.startswith(("dense.", "table.", "numerics.")):  # Adam divides even the smallest gradients by their size
            torch.testing.assert_close(got_state[name], tensor, rtol=2e-3, atol=2e-4, msg=name)


def test_a_restart_changes_no_bit() -> None:
    stream = [block for case in CASES.values() for block in blocks(case, apart=False, batches=2)]
    through, resumed = new_learner(), new_learner()
    for block in stream[:3]:
        through.step(through.prepare(block))
    resumed.load_state(through.state())
    for block in stream[3:]:
        scores = [learner.step(learner.prepare(block)).scores for learner in (through, resumed)]
        assert torch.equal(*scores)


@pytest.mark.parametrize("ranker", ["mmoe", "linear"])
def test_rankers_that_read_the_whole_input_are_trained_on_it(ranker: RankerName) -> None:
    learner = new_learner(ranker)
    assert learner.prepare(blocks(CASES["everything"], apart=False)[0]).requests is None


def test_examples_of_a_user_are_together_where_the_log_has_no_requests() -> None:
    request = np.array([1, 1, 2, MISSING, MISSING, MISSING, 1, 1])
    user = np.array([5, 6, 6, 6, 6, 7, 7, 7])
    assert first_of_requests(request, user).tolist() == [0, 2, 3, 5, 6]


@pytest.mark.parametrize("outlier", [1.0, 12.0])
def test_products_and_gradients_are_those_of_plain_operators(outlier: float) -> None:
    x, parts, weights, moments = _split(outlier)
    read = read_split(x, *weights, moments, 8.0)
    assert read is not None
    z = moments_before().standardise(x.whole(), 8.0)
    assert bool((z.abs() == 8).any()) == (outlier > 1)
    expected = F.linear(x.whole(), weights[0]), F.linear(_clipped(x), weights[1])
    probes = [torch.randn(y.shape, generator=torch.Generator().manual_seed(7)) for y in expected]
    found = []
    for outputs in (read, expected):
        loss = sum((y * probe).sum() for y, probe in zip(outputs, probes, strict=True))
        assert isinstance(loss, Tensor)
        found.append(torch.autograd.grad(loss, [*parts, *weights]))
    for got, wanted in ((read, expected), found):
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_moments_count_each_instance() -> None:
    x, _, weights, moments = _split(1.0)
    expected = moments_before()
    assert read_split(x, *weights, moments, 8.0) is not None
    expected.observe(x.whole().detach())
    for name in ("count_C", "mean_C", "variance_C"):
        torch.testing.assert_close(getattr(moments, name), getattr(expected, name), rtol=1e-5, atol=1e-6)


def test_what_lies_far_out_is_not_folded_and_not_counted() -> None:
    x, _, weights, moments = _split(1e4)
    assert read_split(x, *weights, moments, 8.0) is None
    assert torch.equal(moments.mean_C, moments_before().mean_C)


def moments_before() -> RunningMoments:
    """Of 8 columns, as a stream has left them."""
    generator = torch.Generator().manual_seed(3)
    moments = RunningMoments(8)
    moments.observe(torch.randn(100, 8, generator=generator) * 2 + 1)
    return moments


def _split(outlier: float) -> tuple[SplitInput, tuple[Tensor, Tensor], tuple[Tensor, Tensor], RunningMoments]:
    generator = torch.Generator().manual_seed(1)
    request, item = torch.randn(5, 3, generator=generator), torch.randn(N, 5, generator=generator)
    request[2, 1] *= outlier * 2
    item[::7, 3] *= outlier * 2
    parts = request.requires_grad_(), item.requires_grad_()
    weights = torch.randn(6, 8, generator=generator), torch.randn(4, 8, generator=generator)
    for weight in weights:
        weight.requires_grad_()
    columns = torch.tensor([1, 4, 6]), torch.tensor([0, 2, 3, 5, 7])
    x = SplitInput(*parts, *columns, RequestRows(torch.from_numpy(STARTS), N))
    return x, parts, weights, moments_before()


def _clipped(x: SplitInput) -> Tensor:
    scale_C, shift_C = moments_before().affine()
    return (x.whole() * scale_C.float() + shift_C.float()).clamp(-8, 8)
