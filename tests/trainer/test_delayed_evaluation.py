"""Impressions trained on before their labels are final count once, when these come, as if they had been known at once.

The reference is the evaluation of the same impressions as whole examples: the weights that score them are the same.
"""

from dataclasses import replace

import numpy as np
import pytest

from smes.events import CLOSING, FIRST, FURTHER, ExampleBlock
from tests.trainer.test_evaluation import SCHEMA, Weights, batches, evaluation, run, scores_of
from trainer.config import EvaluationConfig
from trainer.evaluation import ProgressiveEvaluation
from trainer.observers import StepFigures

CONFIG = EvaluationConfig(150, 90)


def numbered(stream: list[ExampleBlock]) -> list[ExampleBlock]:
    """The same with an id for each impression."""
    start = 0
    for batch in stream:
        batch.impression_id[:] = 1000 + np.arange(start, start + len(batch))
        start += len(batch)
    return stream


def of_kind(block: ExampleBlock, kind: int) -> ExampleBlock:
    return replace(block, kind=np.full(len(block), kind, np.int8))


def first_of(batch: ExampleBlock) -> ExampleBlock:
    """What is trained on first: no label is known."""
    return replace(
        of_kind(batch, FIRST), labels=np.zeros_like(batch.labels), label_mask=np.zeros_like(batch.label_mask)
    )


def delayed(
    evaluated: ProgressiveEvaluation, weights: Weights, stream: list[ExampleBlock], lag: int, rng: np.random.Generator
) -> ProgressiveEvaluation:
    """Train on first examples, with further ones of earlier impressions among them; close each batch ``lag`` later.

    The evaluation is now and then replaced by one that goes on from its state.
    """
    for number, batch in enumerate(stream):
        step = first_of(batch)
        if number:
            earlier = of_kind(stream[number - 1], FURTHER)
            mixed = ExampleBlock.concat([earlier, step])
            order = rng.permutation(len(mixed))
            kept = np.argsort(order)[len(earlier) :]  # first examples keep their order among the others
            places = np.empty(len(mixed), np.int64)
            places[np.sort(kept)] = np.arange(len(earlier), len(mixed))
            places[np.setdiff1d(np.arange(len(mixed)), kept)] = np.arange(len(earlier))
            step = mixed.take(places)
        evaluated.before_step(step)
        scores = scores_of(weights.version, step.ids)
        weights.version += 1
        evaluated.after_step(step, StepFigures(scores))
        if number >= lag:
            evaluated.after_closing(of_kind(stream[number - lag], CLOSING))
        if rng.random() < 0.2:
            state = {name: array.copy() for name, array in evaluated.state().items()}
            evaluated = evaluation(CONFIG, weights)
            evaluated.load_state(state)
    for batch in stream[max(0, len(stream) - lag) :]:
        evaluated.after_closing(of_kind(batch, CLOSING))
    return evaluated


@pytest.mark.parametrize("lag", [0, 1, 7, 1000])
def test_every_metric_is_that_of_whole_examples(lag: int) -> None:
    stream = numbered(batches(700, served=0.3))
    weights = Weights()
    run(whole := evaluation(CONFIG, weights), weights, stream)

    weights = Weights()
    evaluated = delayed(evaluation(CONFIG, weights), weights, stream, lag, np.random.default_rng(lag))

    expected, got = whole.report(), evaluated.report()
    for task in SCHEMA.tasks:
        for name in ("examples", "positives", "auc", "ne", "ece", "calibration", "gauc_windowed", "xauc", "mae"):
            assert getattr(got[task.name], name) == pytest.approx(getattr(expected[task.name], name), rel=1e-9), name
    assert expected["click"].gauc_windowed is not None
    assert sum(len(a) for name, a in evaluated.state().items() if name == "open.impression_id") == 0


def test_an_impression_counts_when_its_labels_are_final_and_not_before() -> None:
    (batch, *_) = numbered(batches(40))
    weights = Weights()
    evaluated = evaluation(CONFIG, weights)
    evaluated.before_step(first_of(batch))
    evaluated.after_step(first_of(batch), StepFigures(scores_of(0, batch.ids)))
    before = evaluated.report()["click"].examples

    evaluated.after_closing(of_kind(batch, CLOSING))

    assert before == 0
    assert evaluated.report()["click"].examples == batch.label_mask[:, 0].sum()


def test_impressions_whose_first_step_was_not_taken_have_no_score_and_do_not_count() -> None:
    (batch, *_) = numbered(batches(40))
    evaluated = evaluation(CONFIG, Weights())
    evaluated.before_step(first_of(batch))
    evaluated.after_failed_step(first_of(batch))

    evaluated.after_closing(of_kind(batch, CLOSING))

    assert evaluated.report()["click"].examples == 0


def test_closing_examples_of_impressions_that_were_never_scored_do_not_count() -> None:
    (batch, *_) = numbered(batches(40))
    evaluated = evaluation(CONFIG, Weights())

    evaluated.after_closing(of_kind(batch, CLOSING))

    assert evaluated.report()["click"].examples == 0


def test_an_impression_that_was_read_late_does_not_open_a_window_again() -> None:
    stream = numbered(batches(400))
    late = first_of(stream[0].take(slice(0, 1)))
    weights = Weights()
    evaluated = evaluation(EvaluationConfig(100, 10**9), weights)
    for batch in stream:
        evaluated.before_step(first_of(batch))
        weights.version += 1
    windows = evaluated.state()["windows"]

    evaluated.before_step(late)

    assert evaluated.state()["windows"][:, 0].tolist() == windows[:, 0].tolist()
    assert evaluated.state()["windows"][-1, 2] == windows[-1, 2] + 1


def test_while_several_ranks_train_no_impression_is_ranked_and_all_else_counts() -> None:
    """The evaluation of one rank, then of several, which have no frozen weights, then of one again."""
    stream, lag = numbered(batches(700, served=0.3)), 7
    weights = Weights()
    run(whole := evaluation(CONFIG, weights), weights, stream)

    weights = Weights()
    evaluated = evaluation(CONFIG, weights)
    for number, batch in enumerate(stream):
        if number in (len(stream) // 3, 2 * len(stream) // 3):
            state = {name: array.copy() for name, array in evaluated.state().items()}
            several = number < len(stream) // 2
            evaluated = (
                ProgressiveEvaluation(SCHEMA, CONFIG, freeze=None, thaw=None)
                if several
                else evaluation(CONFIG, weights)
            )
            evaluated.load_state(state)
        step = first_of(batch)
        evaluated.before_step(step)
        scores = scores_of(weights.version, step.ids)
        weights.version += 1
        evaluated.after_step(step, StepFigures(scores))
        if number >= lag:
            evaluated.after_closing(of_kind(stream[number - lag], CLOSING))
    for batch in stream[-lag:]:
        evaluated.after_closing(of_kind(batch, CLOSING))

    assert evaluated.progressive() == whole.progressive()
    ranked, all_ranked = (
        each.since(each.totals() | {"group_auc": np.zeros(2)}, with_open=True)[1] for each in (evaluated, whole)
    )
    assert all(0 < ranked[task] < all_ranked[task] for task in ranked if all_ranked[task])
