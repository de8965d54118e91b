"""Gains with their errors, and verdicts, of sums whose truth is known."""

import numpy as np
import pytest

from smes.arrays import F64
from smes.model.corrections import CorrectionSums
from smes.model.own_experts import LEAST_BLOCKS, OwnExperts, own_experts, own_experts_report

S = 64


def _sums(gains_KT: F64, *, noise: float, positives: float = 100, blocks: int = S, seed: int = 0) -> CorrectionSums:
    """Two tasks, one group: the corrections gain so much of the loss, in percent, but for noise of each block.

    Args:
        gains_KT: Of shift and scale (not counted), of the own network and of the shared one.
        noise: Standard deviation of a block's gain, percent.
        positives: A block's.
        blocks: S.
        seed: Of the noise.
    """
    rng = np.random.default_rng(seed)
    loss_ST = rng.uniform(50, 150, (blocks, 2))
    gains_SKT = gains_KT + noise * rng.normal(size=(blocks, 3, 2))
    gains_SKT[:, 0] = 0
    loss_SKT = loss_ST[:, None] * (1 - gains_SKT / 100)
    loss_SKT[: blocks // 2] *= 5  # what came before is not judged
    return CorrectionSums((0, 0), np.full((blocks, 2), positives), loss_SKT, np.zeros((blocks, 2, 2)))


def _figures(own: float, shared: float, noise: float, **options: float) -> OwnExperts:
    sums = _sums(np.array([[0, 0], [0, own], [0, shared]]), noise=noise, **options)  # type: ignore[arg-type]
    return own_experts(sums, ["click", "follow"])[1]


def test_gains_and_errors_are_right_on_average() -> None:
    """Over many streams: the mean gain is the true one, and two errors miss it in about one of twenty."""
    figures = [_figures(3.0, 1.0, noise=4.0, seed=seed) for seed in range(400)]
    for name, truth in (("own", 3.0), ("shared", 1.0), ("lead", 2.0)):
        gains = [getattr(figure, name) for figure in figures]
        missed = np.mean([abs(gain.pct - truth) > 2 * gain.error_pct for gain in gains])
        assert np.mean([gain.pct for gain in gains]) == pytest.approx(truth, abs=0.15), name
        assert 0.02 < missed < 0.1, name


@pytest.mark.parametrize(
    ("own", "shared", "noise", "options", "verdict"),
    [
        (3.0, 1.0, 0.5, {}, "own experts would help"),
        (3.0, 2.5, 0.5, {}, "more shared experts would help"),
        (0.5, 1.0, 0.5, {}, "more shared experts would help"),
        (3.0, 2.5, 20.0, {}, "too few positives to tell"),
        (3.0, 1.0, 20.0, {}, "too few positives to tell"),
        (0.1, 0.0, 0.1, {}, "shared is enough"),
        (-2.0, 0.0, 0.5, {}, "shared is enough"),
        (-0.1, -1.0, 0.1, {}, "shared is enough"),
        (3.0, 1.0, 0.5, {"positives": 1}, "too few positives to tell"),
        (0.0, 0.0, 0.0, {"positives": 1}, "too few positives to tell"),
        (3.0, 1.0, 0.5, {"blocks": LEAST_BLOCKS}, "too few positives to tell"),
    ],
)
def test_verdicts(own: float, shared: float, noise: float, options: dict[str, float], verdict: str) -> None:
    assert _figures(own, shared, noise, **options).verdict == verdict


def test_a_stream_that_is_too_short_has_no_gains() -> None:
    figure = _figures(3.0, 1.0, 0.5, blocks=2)
    assert (figure.own, figure.shared, figure.lead) == (None, None, None)
    nothing = CorrectionSums((0, 0), np.zeros((0, 2)), np.zeros((0, 3, 2)), np.zeros((0, 2, 2)))
    figure = own_experts(nothing, ["click", "follow"])[0]
    assert (figure.own, figure.positives, figure.cosine) == (None, 0, None)
    assert figure.verdict == "too few positives to tell"


def test_a_task_that_shares_with_none_has_its_own_already() -> None:
    sums = _sums(np.zeros((3, 2)), noise=1.0)
    alone = CorrectionSums((0, 1), sums.positives_ST, sums.loss_SKT, sums.gram_STT)
    assert [figure.verdict for figure in own_experts(alone, ["click", "follow"])] == ["has its own already"] * 2


def test_the_report_says_the_same_in_plain_values() -> None:
    sums = _sums(np.array([[0, 0], [1, 2], [1, 1]]), noise=0.1)
    figures, report = own_experts(sums, ["click", "follow"]), own_experts_report(sums, ["click", "follow"])
    for figure, values in zip(figures, report, strict=True):
        assert figure.own is not None
        assert values["own"] == {"pct": figure.own.pct, "error_pct": figure.own.error_pct}
        assert (values["task"], values["group"]) == (figure.task, ["click", "follow"])
        assert (values["cosine"], values["verdict"]) == (None, figure.verdict)
