"""Freshness: each feedback counts once, at the first answer by a version trained on it."""

import numpy as np
from msgspec.structs import replace

from feature_store.publication import Chunk, Manifest
from smes_scorer.telemetry import Arrivals, FirstAnswer, FirstAnswers

MANIFEST = Manifest(
    lineage="a",
    version=1,
    parent=None,
    schema_hash="h",
    step=1,
    created_ms=1,
    total_bytes=1,
    chunks=(Chunk(1, "0" * 64),),
    upload="u",
    event_time_ms=None,
    kind="full",
    positions={},
    metrics={},
    feedback_arrivals=(),
)


def served(version: int, lineage: str = "a") -> tuple[str, int]:
    return lineage, version


def arrivals(*pairs: tuple[int, int]) -> Arrivals:
    return Arrivals.of([replace(MANIFEST, feedback_arrivals=pairs)])


def as_pairs(answer: FirstAnswer | None) -> list[tuple[int, int]] | None:
    return None if answer is None else list(zip(answer.freshness_ms.tolist(), answer.count.tolist(), strict=True))


def test_arrivals_of_several_manifests() -> None:
    five_and_six = replace(MANIFEST, feedback_arrivals=((5, 1), (6, 2)))
    nine = replace(MANIFEST, feedback_arrivals=((9, 3),))

    together = Arrivals.of([five_and_six, MANIFEST, nine])

    assert together.arrival_ms.tolist() == [5, 6, 9]
    assert together.count.tolist() == [1, 2, 3]


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
    many = Arrivals(np.zeros(400_000, np.int64), np.ones(400_000, np.int64))

    dropped = [first.loaded(("a", version), many) for version in range(5)]
    answer = first.answered(served(4), 1)

    assert dropped == [0, 0, 400_000, 400_000, 400_000]
    assert answer is not None
    assert len(answer.count) == 800_000
