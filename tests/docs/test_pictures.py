"""The plot of the model's forms shows the figures of the pages that it is read from."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from benchmarks.forms_plot import column, measured, plot

ROOT = Path(__file__).resolve().parents[2]


def test_the_plot_has_the_figures_of_the_pages(tmp_path: Path) -> None:
    forms, steps = measured()

    assert forms["the paper's form"] == 0.6569
    assert list(forms.values()) == sorted(forms.values())
    assert (steps["before"], steps["the default now"]) == (0.565, 0.686)
    plot(tmp_path / "plot.png")
    drawn, committed = (imread(path) for path in (tmp_path / "plot.png", ROOT / "docs/images/smes-forms-measured.png"))
    assert drawn.shape == committed.shape
    assert np.abs(drawn - committed).mean() < 0.002  # a digit that differs is more


def test_a_row_that_the_page_has_not_is_named() -> None:
    with pytest.raises(ValueError, match=r"worlds.md, ## One thing .*: no row 'one expert'"):
        column("worlds.md", "## One thing changed at a time", {"one expert": "one"}, "GAUC")
