"""What is left out while a stream is suspect: when that begins and ends, and that nothing is otherwise."""

import numpy as np
import pytest

from smes.arrays import F32, I64
from smes.events import ExampleBlock
from tests.trainer.test_gate import BATCH, SCHEMA, Stream, Truth, known
from trainer.config import GateConfig
from trainer.gate import PublishGate
from trainer.gate_sample import Examples, SampledStretch
from trainer.gate_sifting import Sifter, surprise

BINARY = np.array([True, True, False])


def config(**others: object) -> GateConfig:
    values = {"sample_share": 1.0, "stretch_examples": 2048, "warm_up_examples": 1024, **others}
    return GateConfig(enabled=True, **values)  # type: ignore[arg-type]


def liked(examples: ExampleBlock, live: F32) -> None:
    """One example in twenty is clicked and liked, of all things where hardly any other is."""
    examples.numerics[::20, 0] = -3.0
    examples.labels[::20, :2] = 1
    live[::20] = Truth().score(examples.ids[::20], examples.numerics[::20])


def likes_and_cuts(stream: Stream, batches: int) -> list[bool]:
    passed = []
    for _ in range(batches):
        stream.train(1, liked)
        passed.append(stream.cut())
    return passed


def test_the_surprise_is_the_loss_of_the_binary_labels_that_count() -> None:
    scores, labels = np.array([[0.5, 0.1, 7.0]] * 2, np.float32), np.array([[1, 1, 3]] * 2, np.float32)
    mask = np.array([[True, True, True], [True, False, True]])
    assert surprise(scores, labels, mask, BINARY) == pytest.approx([np.log(20), np.log(2)], rel=1e-6)
    scores[:, 0] = np.nan
    assert surprise(scores, labels, mask, BINARY) == pytest.approx([np.log(10), 0])


def test_a_stream_that_is_not_suspect_is_not_touched() -> None:
    stream, without = known(config()), known(config(sift=False))
    for _ in range(50):
        stream.train(1)
        without.train(1)
        examples = stream.batch()
        without.batch()
        assert stream.gate.sift(examples) is examples
        assert stream.cut()
        assert without.cut()
    assert stream.gate.summary() == without.gate.summary()
    assert stream.gate.summary()["left_out"] == 0


def test_what_is_implausible_is_left_out_and_the_rest_is_published() -> None:
    stream = known(config(then="go_back", accept_after_s=None))
    stream.train(1, liked)
    verdict = stream.gate.judge()
    assert verdict.go_back, "at once: what comes from now on is sifted"
    assert verdict.reason.startswith("stream_")
    stream.gate.went_back(Truth(), stream.at // BATCH)
    passed = likes_and_cuts(stream, 30)
    assert passed[-20:] == [True] * 20
    assert stream.gate.summary()["sifts"]
    examples = stream.batch()
    liked(examples, Truth().score(examples.ids, examples.numerics))
    sifted = stream.gate.sift(examples)
    assert (sifted.weight[::20] == 0).all()
    assert np.count_nonzero(sifted.weight == 0) <= BATCH // 20 + 4
    assert (examples.weight == 1).all()


def test_it_ends_when_little_is_implausible_and_does_not_begin_again() -> None:
    stream = known(config())
    likes_and_cuts(stream, 8)
    assert stream.gate.summary()["sifts"]
    for _ in range(100):
        stream.train(1)
        stream.cut()
    summary = stream.gate.summary()
    assert not summary["sifts"]
    assert not summary["refused_in_a_row"]
    assert stream.gate._sifter.begun == 1
    left_out = summary["left_out"]
    stream.train(5)
    assert stream.gate.summary()["left_out"] == left_out


def test_while_it_goes_on_it_does_not_end() -> None:
    stream = known(config(accept_after_s=None))
    likes_and_cuts(stream, 100)
    assert stream.gate.summary()["sifts"]
    assert stream.gate._sifter.begun == 1


def test_a_world_that_has_changed_for_good_is_let_in() -> None:
    stream = known(config(accept_after_s=3000.0))  # a batch is 256 seconds
    assert not all(likes_and_cuts(stream, 4))
    assert stream.gate.summary()["sifts"]

    def learned(examples: ExampleBlock, live: F32) -> None:
        liked(examples, live)
        if not stream.gate.sifts:
            live[::20, :2] = 0.95

    passed = []
    for _ in range(40):
        stream.train(1, learned)
        passed.append(stream.cut())
    assert passed[-20:] == [True] * 20
    assert not stream.gate.summary()["sifts"]
    assert stream.gate._sifter.begun == 1, "what is usual now is not implausible"


@pytest.mark.parametrize("tasks", [slice(0, 2), slice(0, 1)])
def test_a_world_of_which_everything_is_left_out_is_let_in_all_the_same(tasks: slice) -> None:
    stream = known(config(accept_after_s=3000.0))

    def other_world(examples: ExampleBlock, live: F32) -> None:
        examples.labels[:, tasks] = 1 - examples.labels[:, tasks]
        if not stream.gate.sifts:
            live[:, tasks] = 1 - live[:, tasks]

    class HasLearned(Truth):
        def score(self, ids: I64, numerics: F32, now_ms: I64 | int | None = None) -> F32:
            scores = super().score(ids, numerics)
            scores[:, tasks] = 1 - scores[:, tasks]
            return scores

    passed = []
    for _ in range(30):
        stream.train(1, other_world)
        passed.append(stream.gate.judge().passed)
        if passed[-1]:
            stream.gate.published(HasLearned(), stream.at // BATCH)
    assert passed[:10] == [False] * 10
    assert passed[-10:] == [True] * 10


def test_a_promoted_cut_ends_it() -> None:
    stream = known(config())
    likes_and_cuts(stream, 2)
    assert stream.gate.summary()["sifts"]
    stream.gate.accept_stream("a cut that was refused was promoted")
    assert not stream.gate.summary()["sifts"]


def test_a_user_who_floods_the_stream_is_left_out() -> None:
    stream = known(config(accept_after_s=None))

    def flood(examples: ExampleBlock, live: F32) -> None:
        examples.ids[:60, 0] = 7
        examples.labels[:60, 0] = 1

    passed = []
    for _ in range(30):
        stream.train(1, flood)
        passed.append(stream.cut())
    assert not passed[0]
    assert passed[-20:] == [True] * 20
    examples = stream.batch()
    flood(examples, Truth().score(examples.ids, examples.numerics))
    assert (stream.gate.sift(examples).weight[:60] == 0).all()


def test_of_a_batch_that_is_mostly_implausible_nothing_is_kept() -> None:
    sifter, stream = Sifter(BINARY, 2048), Stream(config())
    sifter.is_on, sifter._limit = True, 8.0
    examples = stream.batch(10)
    served = Truth().score(examples.ids, examples.numerics)
    examples.labels[:, :2], served[:, :2] = 0, 0.01
    assert sifter.sift(examples, served) is examples
    examples.labels[:4, :2] = 1
    assert sifter.sift(examples, served).weight.tolist() == [0] * 4 + [1] * 6
    examples.labels[:6, :2] = 1
    assert not sifter.sift(examples, served).weight.any()
    assert sifter.left_out == 14


def test_a_restart_goes_on_sifting_the_same() -> None:
    stream, other = known(config()), known(config())
    for change in (liked, liked, None, liked, None, None, None, None, None, None):
        for _ in range(3):
            stream.train(1, change)
            other.train(1, change)
            assert stream.cut() == other.cut()
            restored = PublishGate(SCHEMA, config(), thaw=lambda state: Truth())
            restored.load_state({name: array.copy() for name, array in other.gate.state().items()})
            other.gate = restored
            assert other.gate.summary() == stream.gate.summary()
    assert stream.gate.summary()["left_out"] > 0
    mine, theirs = stream.gate.state(), other.gate.state()
    assert mine.keys() == theirs.keys()
    assert all(np.array_equal(mine[name], theirs[name], equal_nan=mine[name].dtype.kind == "f") for name in mine)


def test_labels_of_a_task_that_is_suspect_as_a_whole_are_left_out_until_it_is_as_usual() -> None:
    stream = known(config(then="go_back", accept_after_s=None))

    def clicked(examples: ExampleBlock, live: F32) -> None:
        examples.labels[:, 0] = 1

    backs = 0
    for _ in range(12):
        stream.train(1, clicked)
        verdict = stream.gate.judge()
        assert not verdict.passed
        if verdict.go_back:
            backs += 1
            stream.gate.went_back(Truth(), stream.at // BATCH)
    assert 1 <= backs <= 2, "what is left out taught nothing that one would have to go back from"
    examples = stream.batch()
    sifted = stream.gate.sift(examples)
    assert not sifted.label_mask[:, 0].any()
    assert sifted.label_mask[:, 1:].all()
    assert examples.label_mask.all()
    for _ in range(40):
        stream.train(1)
        passed = stream.cut()
    assert passed
    assert len(stream.gate.backs) == backs
    assert stream.gate.sift(examples).label_mask.all()


def losing(rng: np.random.Generator, n: int, implausible: float = 0.0) -> Examples:
    """Examples whose losses are exponential, a mean of 1 nat; of some, 20 nats."""
    loss = np.where(rng.random(n) < implausible, 20.0, rng.exponential(1.0, n))
    served = np.stack([np.exp(-loss), np.ones(n), np.zeros(n)], axis=1).astype(np.float32)
    labels = np.tile(np.array([1, 1, 0], np.float32), (n, 1))
    return Examples(np.arange(n), np.zeros(n, np.bool_), labels, np.ones((n, 3), np.bool_), served, served)


def first_found(rng: np.random.Generator, looks: int, each: int, implausible_from: int) -> int | None:
    """The look in which too many examples are implausible, if 5 % of them are from some look on."""
    sifter, sample = Sifter(BINARY, 8192), SampledStretch(8192, BINARY)
    for look in range(looks):
        part = losing(rng, each, 0.05 if look >= implausible_from else 0.0)
        sample.add(part)
        if sifter.unusual(sample, min(sample.total, 8192), 5.0):
            return look
        sifter.learn(part)
    return None


def test_a_limit_that_is_hardly_known_gives_no_stream_away() -> None:
    rng = np.random.default_rng(0)

    assert [first_found(rng, 30, 256, 30) for _ in range(300)] == [None] * 300


def test_one_example_in_twenty_is_found_within_some_hundred_examples() -> None:
    rng = np.random.default_rng(0)
    found = [first_found(rng, 130, 128, 120) for _ in range(20)]

    assert all(look is not None and 120 <= look <= 123 for look in found), found
    assert found.count(120) >= 10
