"""The feedback of a cut, with the wall times of its stages: from real streams and steps, by clocks of the test."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from smes.events import CLOSING, FURTHER, ExampleBlock
from smes.schema import MISSING
from stream.batch_queue import BatchTimes
from stream.config import MiniBatchConfig
from stream.dead_letters import DeadLetterWriter
from stream.example_stream import ExampleStream
from tests.trainer.small_world import SCHEMA, STREAM, fill, open_log
from trainer.freshness import FeedbackArrivals
from trainer.observers import StepFigures

WALL_MS = 1_700_000_500_000
FIGURES = StepFigures(scores=np.zeros((0, 3), np.float32))


class Clock:
    """Both clocks of a machine, which a test moves on."""

    def __init__(self) -> None:
        self.passed_s = 0.0

    def monotonic(self) -> float:
        return 77.0 + self.passed_s

    def now_ms(self) -> int:
        return WALL_MS + round(1000 * self.passed_s)


def arrivals(clock: Clock, times: Callable[[], BatchTimes | None]) -> FeedbackArrivals:
    return FeedbackArrivals(times, monotonic=clock.monotonic, now_ms=clock.now_ms)


def block(arrived_ms: list[list[int]]) -> ExampleBlock:
    examples = ExampleBlock.empty(SCHEMA, len(arrived_ms))
    examples.feedback_arrival_ms[:] = arrived_ms
    return examples


def test_every_stage_has_its_wall_time() -> None:
    clock = Clock()
    noted = arrivals(clock, lambda: BatchTimes(np.array([76.0, 76.5, 76.9]), 77.25))
    examples = block([[WALL_MS - 5000, MISSING, WALL_MS - 4000], [MISSING] * 3, [MISSING, WALL_MS - 300, MISSING]])
    clock.passed_s = 0.5
    noted.before_step(examples)
    clock.passed_s = 0.75
    noted.after_step(examples, FIGURES)

    feedback = noted.take()

    assert feedback.arrived_ms.tolist() == [WALL_MS - 5000, WALL_MS - 4000, WALL_MS - 300]
    assert feedback.joined_ms.tolist() == [WALL_MS - 1000, WALL_MS - 1000, WALL_MS - 100]
    assert feedback.batched_ms.tolist() == [WALL_MS + 250] * 3
    assert feedback.trained_ms.tolist() == [WALL_MS + 750] * 3
    assert feedback.count.tolist() == [1, 1, 1]
    assert len(noted.take()) == 0


def test_a_failed_step_has_taught_nothing() -> None:
    clock = Clock()
    noted = arrivals(clock, lambda: BatchTimes(np.array([77.0]), 77.0))
    failed, good = block([[WALL_MS, MISSING, MISSING]]), block([[WALL_MS + 1, MISSING, MISSING]])
    for examples in (failed, good):
        noted.before_step(examples)
    noted.after_failed_step(failed)
    noted.after_step(good, FIGURES)

    assert noted.take().arrived_ms.tolist() == [WALL_MS + 1]


def test_feedback_of_a_log_in_files_has_never_arrived() -> None:
    noted = arrivals(Clock(), lambda: BatchTimes(np.full(1, 77.0), 77.0))
    examples = block([[0, WALL_MS, MISSING]])
    noted.before_step(examples)
    noted.after_step(examples, FIGURES)

    assert noted.take().arrived_ms.tolist() == [WALL_MS]


def test_a_step_from_before_the_watching_is_left_out() -> None:
    noted = arrivals(Clock(), lambda: BatchTimes(np.array([77.0]), 77.0))
    before, watched = block([[WALL_MS, MISSING, MISSING]]), block([[WALL_MS + 1, MISSING, MISSING]])
    noted.before_step(watched)
    noted.after_step(before, FIGURES)  # its result came only now
    noted.after_step(watched, FIGURES)

    assert noted.take().arrived_ms.tolist() == [WALL_MS + 1]


def test_feedback_counts_where_it_is_trained_on() -> None:
    noted = arrivals(Clock(), lambda: BatchTimes(np.full(3, 77.0), 77.0))
    examples = block([[WALL_MS, WALL_MS + 1, MISSING]] * 3)
    examples.kind[1:] = [FURTHER, CLOSING]
    examples.label_mask[:] = [[True, False, False], [False, True, False], [True, True, True]]
    noted.before_step(examples)
    noted.after_step(examples, FIGURES)

    assert noted.take().arrived_ms.tolist() == [WALL_MS, WALL_MS + 1]


def test_a_stream_gives_the_times_of_its_batches() -> None:
    clock, log = Clock(), open_log(1)
    config = replace(STREAM, batch=MiniBatchConfig(size=64, max_wait_s=0.5))
    stream = ExampleStream(
        SCHEMA, config, log, DeadLetterWriter(log), monotonic=clock.monotonic, now_ms=lambda: 1_700_000_100_000
    )
    noted = arrivals(clock, stream.taken_times)
    fill(log, 1400, partitions=1)
    while stream.poll(0):
        pass
    clock.passed_s = 2.0
    stream.poll(0)
    arrived = 0
    while (examples := stream.next_batch()) is not None:
        arrived += int((examples.feedback_arrival_ms != MISSING).sum())
        noted.before_step(examples)
        noted.after_step(examples, FIGURES)

    feedback = noted.take()

    assert feedback.count.sum() == arrived > 50
    assert set(feedback.joined_ms.tolist()) == {WALL_MS}
    assert set(feedback.batched_ms.tolist()) == {WALL_MS, WALL_MS + 2000}  # full ones, and what the clock ended
    assert set(feedback.trained_ms.tolist()) == {WALL_MS + 2000}
