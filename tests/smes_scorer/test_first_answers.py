"""Freshness: each feedback counts once, at the first answer by a version trained on it."""

import numpy as np
from msgspec.structs import replace

from smes_scorer.first_answers import STAGES, Arrivals, FirstAnswer, FirstAnswers
from tests.manifests import make_manifest

MANIFEST = make_manifest(created_ms=800, published_ms=860)


def served(version: int, lineage: str = "a") -> tuple[str, int]:
    return lineage, version


def arrivals(*pairs: tuple[int, int]) -> Arrivals:
    return Arrivals.of([replace(MANIFEST, feedback_arrivals=tuple((ms, count, 0, 0, 0) for ms, count in pairs))])


def as_pairs(answer: FirstAnswer | None) -> list[tuple[int, int]] | None:
    return None if answer is None else list(zip(answer.freshness_ms.tolist(), answer.count.tolist(), strict=True))


def test_arrivals_of_several_manifests() -> None:
    five_and_six = replace(MANIFEST, feedback_arrivals=((5, 1, 10, 20, 30), (6, 2, 0, 0, 7)))
    nine = replace(MANIFEST, feedback_arrivals=((9, 3, 1, 1, 1),), created_ms=100, published_ms=110)

    together = Arrivals.of([five_and_six, MANIFEST, nine])

    assert together.count.tolist() == [1, 2, 3]
    assert together.times_ms.tolist() == [
        [5, 15, 35, 65, 800, 860],
        [6, 6, 6, 13, 800, 860],
        [9, 10, 11, 12, 100, 110],
    ]


def test_arrivals_of_no_manifest() -> None:
    assert Arrivals.of(()).count.tolist() == []


def test_the_first_answer_of_each_version_counts_its_new_feedback() -> None:
    first = FirstAnswers()

    first.loaded(("a", 1), arrivals())
    assert as_pairs(first.answered(served(1), 1000)) == []
    first.loaded(("a", 2), arrivals((900, 2), (1050, 1)))
    assert as_pairs(first.answered(served(2), 1100)) == [(200, 2), (50, 1)]


def test_later_answers_of_a_version_count_nothing() -> None:
    first = FirstAnswers()
    first.loaded(("a", 1), arrivals((900, 2)))
    first.answered(served(1), 1000)

    assert first.answered(served(1), 1001) is None


def test_versions_that_never_answered_are_counted_with_the_next() -> None:
    first = FirstAnswers()
    for version, arrival in ((1, ()), (2, ((100, 1),)), (3, ((200, 2),)), (4, ((300, 3),))):
        first.loaded(("a", version), arrivals(*arrival))

    assert as_pairs(first.answered(served(3), 500)) == [(400, 1), (300, 2)]
    assert as_pairs(first.answered(served(4), 700)) == [(400, 3)]


def test_a_request_that_began_before_the_last_swap_counts_nothing() -> None:
    first = FirstAnswers()
    for version in (1, 2, 3):
        first.loaded(("a", version), arrivals((version * 100, 1)))
    first.answered(served(2), 500)

    assert first.answered(served(1), 600) is None
    assert as_pairs(first.answered(served(3), 700)) == [(400, 1)]


def test_the_freshness_of_an_arrival_in_the_future_is_zero() -> None:
    first = FirstAnswers()
    first.loaded(("a", 1), arrivals((2000, 1)))

    assert as_pairs(first.answered(served(1), 1000)) == [(0, 1)]


def test_another_lineage_drops_the_waiting_arrivals() -> None:
    first = FirstAnswers()
    first.loaded(("a", 1), arrivals((1, 1)))
    first.loaded(("b", 1), arrivals((10, 1)))

    assert as_pairs(first.answered(served(1, "b"), 20)) == [(10, 1)]


def test_the_oldest_waiting_arrivals_are_dropped_and_counted() -> None:
    first = FirstAnswers()
    many = Arrivals(np.ones(400_000, np.int64), np.zeros((400_000, 6), np.int64))

    dropped = [first.loaded(("a", version), many) for version in range(5)]
    answer = first.answered(served(4), 1)

    assert dropped == [0, 0, 400_000, 400_000, 400_000]
    assert answer is not None
    assert len(answer.count) == 800_000


def test_freshness_is_the_sum_of_its_stages() -> None:
    now_ms = [900]
    first = FirstAnswers(lambda: now_ms[0])
    first.loaded(("a", 1), Arrivals.of([replace(MANIFEST, feedback_arrivals=((100, 2, 300, 20, 5),))]))
    now_ms[0] = 950
    first.loaded(("a", 2), Arrivals.of([replace(MANIFEST, feedback_arrivals=((700, 1, 0, 10, 1),))]))

    answer = first.answered(served(2), 1000)

    assert answer is not None
    assert dict(zip(STAGES, answer.stages_ms.T.tolist(), strict=True)) == {
        "joined": [300, 0],
        "batched": [20, 10],
        "trained": [5, 1],
        "cut": [375, 89],
        "published": [60, 60],
        "in_service": [40, 90],
        "answered": [100, 50],  # version 1 was in service for longer before anything was asked
    }
    assert answer.stages_ms.sum(axis=1).tolist() == answer.freshness_ms.tolist() == [900, 300]


def test_where_clocks_disagree_no_stage_takes_less_than_nothing() -> None:
    first = FirstAnswers(lambda: 500)  # behind the trainer's clock
    first.loaded(("a", 1), Arrivals.of([replace(MANIFEST, feedback_arrivals=((790, 1, 0, 0, 0),))]))

    answer = first.answered(served(1), 900)

    assert answer is not None
    assert answer.stages_ms.tolist() == [[0, 0, 0, 10, 60, 0, 400]]
    assert answer.freshness_ms.tolist() == [110]
