"""What compiled loops write of an answer is JSON of the same numbers and items."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smes.arrays import F32
from smes.errors import SmesError
from smes.schema import Schema, Task
from smes_scorer.answer_kernels import write_number
from smes_scorer.answer_writer import AnswerWriter
from smes_scorer.missing import Missing
from smes_scorer.request import ScoreRequest

ODD = [0.0, -0.0, 1e-45, 3.4028235e38, 9.9999999e8, 999999999.0, 1e9, 0.1, 9.999999e-6, 1e-5, 16777216.0, 1 / 3]


def written(value: np.float32) -> str:
    out = np.zeros(20, np.uint8)  # NUMBER_BYTES
    return out[: write_number(value, out, 0)].tobytes().decode()


def check(value: np.float32) -> None:
    text = written(value)
    read = json.loads(text)
    assert isinstance(read, float), text
    assert np.float32(read).tobytes() == value.tobytes(), text
    digits = text.split("e")[0].replace(".", "").replace("-", "").strip("0")
    assert len(digits) <= 9
    if 1e-5 < abs(value) < 1e8:
        assert "e" not in text


def test_every_kind_of_number_reads_back_as_it_was() -> None:
    rng = np.random.default_rng(0)
    bits: F32 = rng.integers(0, 2**32, 10_000, np.uint32).view(np.float32)
    decimals = np.array([n / 10**k for k in range(9) for n in range(0, 1000, 7)], np.float32)
    probabilities = rng.random(5_000, np.float32)
    for value in np.concatenate([bits[np.isfinite(bits)], decimals, probabilities, np.array(ODD, np.float32)]):
        check(value)
    assert [written(np.float32(v)) for v in (0.5, -2, 0.3, 123.25)] == ["0.5", "-2.0", "0.3", "123.25"]


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_any_number_reads_back_as_it_was(value: float) -> None:
    check(np.float32(value))


TASKS = ("odd, task", "é{}", "c")
ITEMS = st.integers(-(2**63) + 1, 2**63 - 1) | st.text(st.characters(codec="utf-8"), min_size=1)


@given(data=st.data(), items=st.lists(ITEMS, min_size=1, max_size=20))
def test_an_answer_has_items_scores_and_ranking_of_the_request(data: Any, items: list[int | str]) -> None:
    n = len(items)
    numbers = st.floats(-1e3, 1e3, width=32)
    some = data.draw(st.lists(numbers, min_size=3, max_size=9))
    scores = np.resize(np.array(some, np.float32), (n, 3))
    top_k = data.draw(st.none() | st.integers(1, 25))
    tasks = data.draw(st.sampled_from([None, (0,), (2, 0), (1, 2, 0)]))
    weights = np.array([1.0, 0.0, -0.5], np.float32)
    request = ScoreRequest(1, items, np.zeros(n, np.int64), {}, {}, 0, top_k, tasks)
    writer = AnswerWriter(Schema("odd", tuple(map(Task, TASKS))), weights)

    answer = json.loads(writer.write('a"', ("l", 7), request, scores, Missing([], ["x"], {"y": 2})))

    fused = scores @ weights
    order = sorted(range(n), key=lambda i: -fused[i])[:top_k]
    assert answer.pop("ranking") == [items[i] for i in order]
    for item, i in zip(answer.pop("items"), sorted(order), strict=True):
        assert item["item_id"] == items[i]
        assert np.float32(item["fused"]) == fused[i]
        chosen = range(3) if tasks is None else tasks
        assert {name: np.float32(v) for name, v in item["scores"].items()} == {TASKS[t]: scores[i, t] for t in chosen}
    assert answer == {
        "arm": 'a"',
        "lineage": "l",
        "version": 7,
        "features_missing": {"user": [], "context": ["x"], "items": {"y": 2}},
    }


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_score_that_is_no_finite_number_is_no_answer(bad: float) -> None:
    scores = np.array([[0.5, 1.0, 2.0], [0.5, bad, 2.0]], np.float32)
    writer = AnswerWriter(Schema("odd", tuple(map(Task, TASKS))), np.array([1, 0, 0], np.float32))
    request = ScoreRequest(1, [1, 2], np.zeros(2, np.int64), {}, {}, 0, 1, (0,))

    with pytest.raises(SmesError, match="snapshot l:7 gave a score that is no finite number"):
        writer.write("main", ("l", 7), request, scores, Missing([], [], {}))
