"""The gate on streams whose truth is known: noise passes, what is wrong does not, and a changed world is accepted."""

from collections.abc import Callable

import numpy as np
import pytest

from smes.arrays import F32, I64, Arrays, Bool
from smes.events import ExampleBlock
from smes.schema import Feature, Schema, Task
from trainer.config import GateConfig
from trainer.gate import PublishGate
from trainer.observers import StepFigures

SCHEMA = Schema(
    name="judged",
    features=(Feature("price", kind="numeric"), Feature("depth", kind="numeric")),
    tasks=(Task("click"), Task("like"), Task("watch", kind="regression", max_value=100.0)),
)
BATCH = 256


class Truth:
    """A version in service that knows the truth: the price is the logit of a click."""

    def score(self, ids: I64, numerics: F32, now_ms: I64 | int | None = None) -> F32:
        price = np.nan_to_num(numerics[:, 0].astype(np.float64))
        click, like = (1 / (1 + np.exp(-(price + shift))) for shift in (-1.0, -4.0))
        return np.stack([click, like, 5 + price], axis=1).astype(np.float32)

    def state(self) -> Arrays:
        return {"nothing": np.zeros(1)}

    def close(self) -> None:
        pass


class Stream:
    """Batches of examples, labelled by the truth, for a gate."""

    def __init__(self, config: GateConfig, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.gate = PublishGate(SCHEMA, config, thaw=lambda state: Truth())
        self.at = 0

    def batch(self, n: int = BATCH) -> ExampleBlock:
        examples = ExampleBlock.empty(SCHEMA, n)
        examples.impression_id[:] = self.at + np.arange(n)
        examples.event_time_ms[:] = 1_000 * (self.at + np.arange(n))
        self.at += n
        examples.ids[:] = self.rng.integers(0, 3000, examples.ids.shape)
        examples.numerics[:] = self.rng.normal(size=examples.numerics.shape)
        p = Truth().score(examples.ids, examples.numerics)
        examples.labels[:, :2] = self.rng.random((n, 2)) < p[:, :2]
        examples.labels[:, 2] = p[:, 2] + self.rng.normal(size=n)
        return examples

    def train(self, batches: int, change: Callable[[ExampleBlock, F32], None] | None = None) -> None:
        """Let the gate see batches; ``change`` changes an example block and the scores of the live weights."""
        for _ in range(batches):
            examples = self.batch()
            live = Truth().score(examples.ids, examples.numerics)
            live[:, :2] *= np.exp(self.rng.normal(0, 0.03, live[:, :2].shape)).astype(np.float32)
            if change:
                change(examples, live)
            self.gate.sift(examples)
            self.gate.after_step(examples, StepFigures(np.clip(live, 0, None)))

    def cut(self) -> bool:
        """Whether the gate lets a cut pass."""
        passed = self.gate.judge().passed
        if passed:
            self.gate.published(Truth(), self.at // BATCH)
        return passed


def known(config: GateConfig | None = None, seed: int = 0) -> Stream:
    """A stream that the gate has seen enough of."""
    stream = Stream(config or GateConfig(enabled=True, sample_share=1.0, stretch_examples=4096), seed)
    assert stream.cut(), "where nothing is in service, what is finite passes"
    for _ in range(30):
        stream.train(1)
        assert stream.cut()
    return stream


def flipped(examples: ExampleBlock, live: F32) -> None:
    examples.labels[:, :2] = 1 - examples.labels[:, :2]


def test_noise_refuses_no_cut() -> None:
    """300 cuts of a good candidate on an honest stream."""
    for seed in range(2):
        stream = known(seed=seed)
        for _ in range(150):
            stream.train(1)
            assert stream.cut(), stream.gate.reason
    assert stream.gate.summary()["refused"] == 0


@pytest.mark.parametrize("learned", [False, True])
def test_flipped_labels_are_refused_at_the_first_cut_even_if_the_candidate_fits_them(learned: bool) -> None:
    stream = known()

    def poison(examples: ExampleBlock, live: F32) -> None:
        flipped(examples, live)
        if learned:
            live[:, :2] = 1 - live[:, :2]

    stream.train(1, poison)
    assert not stream.cut()
    assert "stream_ranking (click)" in stream.gate.reason


def test_a_worse_candidate_is_refused_on_a_good_stream() -> None:
    stream = known()

    def blur(examples: ExampleBlock, live: F32) -> None:
        live[:, 0] = np.clip(live[:, 0] * np.exp(stream.rng.normal(0, 0.8, len(live))), 0.001, 0.999)

    stream.train(8, blur)
    assert not stream.cut()
    assert stream.gate.reason.startswith("loss (click)")


def test_a_candidate_out_of_calibration_is_refused() -> None:
    stream = known()

    def inflate(examples: ExampleBlock, live: F32) -> None:
        live[:, 1] = np.minimum(6 * live[:, 1], 0.9)

    stream.train(8, inflate)
    assert not stream.cut()
    assert "calibration (like)" in stream.gate.reason


def test_scores_that_are_not_finite_are_refused_even_where_nothing_is_in_service() -> None:
    stream = Stream(GateConfig(enabled=True))

    def broken(examples: ExampleBlock, live: F32) -> None:
        live[3, 1] = np.nan

    stream.train(1, broken)
    assert not stream.cut()
    assert "scores of 1 examples are not finite" in stream.gate.reason


def test_weights_that_are_not_finite_are_refusals_in_a_row_although_each_cut_passes_first() -> None:
    stream = known(GateConfig(enabled=True, sample_share=1.0, stretch_examples=4096, max_refusals=3))
    before = stream.gate.summary()
    for number in range(1, 4):
        stream.train(1)
        assert stream.gate.judge().passed
        stream.gate.refuse_weights("dense.bias")
        assert stream.gate.in_a_row == number
    after = stream.gate.summary()
    assert (after["alarms"], after["refused"], after["passed"]) == (1, 3, before["passed"])


def test_a_flood_of_one_users_positives_is_refused() -> None:
    stream = known()

    def flood(examples: ExampleBlock, live: F32) -> None:
        examples.ids[:40, 0] = 7
        examples.labels[:40, 0] = 1

    stream.train(2, flood)
    assert not stream.cut()
    assert "one user has" in stream.gate.reason


def test_values_far_out_of_their_range_are_refused_also_when_few_come_with_each_cut() -> None:
    stream = known()

    def far(examples: ExampleBlock, live: F32) -> None:
        examples.numerics[::100, 1] = 1e4

    for _ in range(12):
        stream.train(1, far)
        if not stream.cut():
            break
    assert "far out of range" in stream.gate.reason


def test_values_that_the_model_reads_as_missing_refuse_nothing() -> None:
    stream = known()

    def far(examples: ExampleBlock, live: F32) -> None:
        examples.numerics[::10, 1] = 1e30

    for _ in range(10):
        stream.train(1, far)
        assert stream.cut(), stream.gate.reason


def test_a_flood_that_rises_slowly_does_not_pass_for_usual() -> None:
    stream = known()
    share = 0.0

    def flood(examples: ExampleBlock, live: F32) -> None:
        examples.ids[: round(share * BATCH), 0] = 7
        examples.labels[: round(share * BATCH), 0] = 1

    for _ in range(60):
        share += 0.004
        stream.train(1, flood)
        if not stream.cut():
            break
    assert "one user has" in stream.gate.reason


def test_a_suspect_stretch_ends_when_twice_as_much_is_in_order_again() -> None:
    stream = known(GateConfig(enabled=True, sample_share=1.0, stretch_examples=64 * BATCH, sift=False))
    stream.train(1, flipped)
    assert not stream.cut()
    stream.train(1)
    assert not stream.cut()
    assert stream.gate.summary()["suspect"]
    stream.train(1)
    assert stream.cut(), stream.gate.reason
    assert not stream.gate.summary()["suspect"]


def test_a_candidate_that_learned_from_a_suspect_stretch_stays_out_when_that_is_over() -> None:
    stream = known()
    stream.train(4, flipped)
    assert not stream.cut()

    def still_wrong(examples: ExampleBlock, live: F32) -> None:
        live[:, 0] = 0.6 * live[:, 0] + 0.4 * (1 - live[:, 0])

    for _ in range(6):
        stream.train(2, still_wrong)
        assert not stream.cut()
    assert "(click)" in stream.gate.reason
    assert not stream.gate.reason.startswith("stream")


@pytest.mark.parametrize("after_s", [600.0, None])
def test_a_world_that_has_changed_for_good_is_accepted_if_that_is_configured(after_s: float | None) -> None:
    config = GateConfig(enabled=True, sample_share=1.0, stretch_examples=4096, accept_after_s=after_s)
    stream = known(config)

    def other_world(examples: ExampleBlock, live: F32) -> None:
        flipped(examples, live)
        live[:, :2] = 1 - live[:, :2]  # and the candidate has learned it

    passed = []
    for _ in range(8):  # 256 seconds each
        stream.train(1, other_world)
        passed.append(stream.cut())
        if passed[-1]:
            break
    assert passed[:2] == [False, False]
    assert passed[-1] == (after_s is not None)


def test_refusals_in_a_row_are_an_alarm_and_a_wish_to_go_back() -> None:
    config = GateConfig(
        enabled=True,
        sample_share=1.0,
        stretch_examples=4096,
        max_refusals=3,
        then="go_back",
        accept_after_s=None,
        sift=False,
    )
    stream = known(config)
    verdicts = []
    for _ in range(3):
        stream.train(1, flipped)
        verdicts.append(stream.gate.judge())
    assert [verdict.go_back for verdict in verdicts] == [False, False, True]
    assert stream.gate.summary()["alarms"] == 1
    stream.gate.went_back(Truth(), stream.at // BATCH)
    back = stream.gate.backs[-1]
    assert (back.at_step, back.to_step) == (stream.at // BATCH, stream.at // BATCH - 3)


def test_a_restart_goes_on_with_the_same_verdicts() -> None:
    config = GateConfig(enabled=True, sample_share=0.5, stretch_examples=2048)
    stream, other = known(config), known(config)
    for changing in (None, flipped, None, None, flipped, None):
        stream.train(3, changing)
        other.train(3, changing)
        assert stream.cut() == other.cut()
        restored = PublishGate(SCHEMA, config, thaw=lambda state: Truth())
        restored.load_state({name: array.copy() for name, array in other.gate.state().items()})
        other.gate = restored
        assert other.gate.summary() == stream.gate.summary()
    mine, theirs = stream.gate.state(), other.gate.state()
    assert mine.keys() == theirs.keys()
    assert all(np.array_equal(mine[name], theirs[name], equal_nan=mine[name].dtype.kind == "f") for name in mine)


def test_the_sample_is_a_share_of_the_impressions_and_the_same_after_a_restart() -> None:
    gate = PublishGate(SCHEMA, GateConfig(enabled=True, sample_share=0.25), thaw=lambda state: Truth())
    ids = np.arange(20_000)
    chosen: Bool = gate._sampled(ids)
    assert chosen.mean() == pytest.approx(0.25, abs=0.02)
