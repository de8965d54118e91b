"""The headline: plain means over the dense binary tasks and over the rare ones, and nothing where nothing is."""

from dataclasses import replace

import numpy as np
import pytest

from trainer.task_figures import Headline, HeadlineFigures, TaskFigures, headline


def binary(base_rate: float | None, auc: float | None, gauc: float | None, ne: float | None) -> TaskFigures:
    return TaskFigures(7, base_rate, auc, gauc, ne, calibration=1.0, ece=0.0, xauc=None, mae=None, mean_bias=None)


WATCH = TaskFigures(7, None, None, None, None, None, None, xauc=0.6, mae=3.0, mean_bias=0.1)
TASKS = {
    "click": binary(0.4, 0.7, 0.6, 0.9),
    "watch": WATCH,
    "comment": binary(0.003, 0.65, 0.5, 1.02),
    "like": binary(0.01, 0.8, 0.7, 0.85),  # exactly at the bound
    "follow": binary(0.001, 0.75, None, 1.1),  # no group with both classes
    "hate": binary(0.0099, 0.55, 0.6, 1.0),
    "gift": binary(0.0, None, None, None),  # never happened
    "seen": binary(1.0, None, None, None),
    "new": binary(None, None, None, None),
}


def test_each_task_counts_the_same_in_the_mean_of_its_kind() -> None:
    said = headline(TASKS)
    for means, names in ((said.dense, ("click", "like")), (said.rare, ("comment", "follow", "hate"))):
        assert means is not None
        assert means.tasks == names
        assert means.auc == pytest.approx(np.mean([TASKS[name].auc or 0 for name in names]))
        assert means.ne == pytest.approx(np.mean([TASKS[name].ne or 0 for name in names]))
    assert said.dense is not None
    assert said.dense.gauc_windowed == pytest.approx(0.65)
    assert said.rare is not None
    assert said.rare.gauc_windowed == pytest.approx(0.55), "of the two tasks that have one"


def test_there_is_no_line_without_tasks() -> None:
    assert headline({"watch": WATCH, "gift": TASKS["gift"]}) == Headline(None, None)
    assert headline({"click": TASKS["click"]}).rare is None
    assert headline({"follow": TASKS["follow"]}) == Headline(None, HeadlineFigures(("follow",), 0.75, None, 1.1))


def test_a_task_with_examples_that_were_not_scored_leaves_no_mean() -> None:
    """What was left out would look like a figure of the model."""
    broken = replace(TASKS["click"], auc=None, gauc_windowed=None, ne=None)
    assert headline(TASKS | {"click": broken}).dense == HeadlineFigures(("click", "like"), None, None, None)
