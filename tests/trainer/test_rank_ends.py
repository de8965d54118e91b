"""Ends of a training of several ranks that one of them hears of while it waits for its event log.

The ranks are threads of this process, which talk over real sockets.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from smes.errors import EventLogError, LeaseLost, RankFailed, StepsNotFinite
from smes.events import ExampleBlock
from smes.world import World
from stream.batch_journal import STEPS, BatchJournal
from stream.dead_letters import DeadLetter, DeadLetterWriter
from stream.example_stream import ExampleStream
from tests.trainer.small_world import SCHEMA, STREAM, open_log
from tests.trainer.test_ranks import PARTITIONS, append, by_rank, everything, rank_trainer
from tests.worlds import on_ranks
from trainer.rank_loop import RankTrainer

_MOST = 2  # failed steps in a row


def test_an_error_while_its_rank_waits_for_the_log_ends_all_at_one_step(tmp_path: Path) -> None:
    log = open_log(PARTITIONS)
    for of_rank in by_rank(400):
        append(log, *of_rank)

    def work(world: World) -> str:
        trainer = rank_trainer(world, log, tmp_path)
        read = trainer._own.poll

        def poll(timeout_s: float) -> int:
            if world.rank == 0 and trainer.steps:
                trainer._joint_results.error = LeaseLost("another trainer publishes")
                trainer.take_part()  # as trainer.waits does while the log is away
            return read(timeout_s)

        trainer._own.poll = poll  # type: ignore[method-assign]  # a broker that is away for one of two clients
        with pytest.raises(RankFailed if world.rank else LeaseLost):
            trainer.run(lambda: False)
        return everything(trainer)

    ended = on_ranks(2, work, timeout_s=5)

    def restored(world: World) -> str:
        trainer = rank_trainer(world, log, tmp_path)
        assert trainer.restore() is not None
        return everything(trainer)

    assert on_ranks(2, restored) == ended


def test_a_stop_that_other_ranks_hear_first_ends_a_wait_for_the_log(tmp_path: Path) -> None:
    log = open_log(PARTITIONS)
    for of_rank in by_rank(400):
        append(log, *of_rank)

    away = threading.Event()

    def work(world: World) -> tuple[int, int]:
        trainer = rank_trainer(world, log, tmp_path)
        read, waits = trainer._own.poll, [0]

        def poll(timeout_s: float) -> int:
            if world.rank == 1 and trainer.steps:
                away.set()
                waits[0] += 1
                for _ in range(1000):
                    trainer.take_part()
            return read(timeout_s)

        trainer._own.poll = poll  # type: ignore[method-assign]  # a broker that is away for one of two clients
        trainer.run(lambda: world.rank == 0 and away.is_set())
        return waits[0], trainer.steps

    (_, first), (waits, second) = on_ranks(2, work, timeout_s=5)

    assert waits == 1
    assert first == second


def test_a_log_that_does_not_say_where_it_ends_ends_all_ranks_at_one_step(tmp_path: Path) -> None:
    log = open_log(PARTITIONS)
    for of_rank in by_rank(400):
        append(log, *of_rank)

    def work(world: World) -> int:
        trainer = rank_trainer(world, log, tmp_path)
        if world.rank == 1:

            def end() -> None:
                trainer.take_part()
                raise EventLogError("the log of rank 1 is gone")

            trainer._own.end = end  # type: ignore[assignment,method-assign]  # a broker that is away for one of two
        with pytest.raises(EventLogError if world.rank else RankFailed, match="rank 1"):
            trainer.run(lambda: trainer.steps > 1, drain=True)
        return trainer.steps

    first, second = on_ranks(2, work, timeout_s=5)

    assert first == second
    assert len(list(tmp_path.glob("*.ranks.json"))) > 0


def test_steps_that_are_not_finite_end_all_ranks_also_where_dead_letters_are_not_written(tmp_path: Path) -> None:
    log = open_log(PARTITIONS)
    for of_rank in by_rank(400):
        append(log, *of_rank)

    def work(world: World) -> int:
        trainer = rank_trainer(world, log, tmp_path)
        take = trainer._own.next_batch

        def poisoned() -> ExampleBlock | None:
            if (examples := take()) is not None:
                examples.weight[:] = np.inf
            return examples

        def write(letters: Sequence[DeadLetter]) -> None:
            if trainer.failed.in_a_row == _MOST:
                raise EventLogError("the log of rank 1 is gone")

        trainer._own.next_batch = poisoned  # type: ignore[method-assign]  # after all that checks events
        trainer.failed._most = _MOST
        if world.rank == 1:
            trainer.failed._write = write
        with pytest.raises(StepsNotFinite):
            trainer.run(lambda: trainer.steps > 2 * _MOST)
        return trainer.failed.in_a_row

    assert on_ranks(2, work, timeout_s=5) == [_MOST] * 2


def test_a_stream_that_was_not_read_for_long_is_neither_idle_nor_spent() -> None:
    log, now_s = open_log(PARTITIONS), [0.0]
    append(log, *by_rank(50)[0])
    stream = ExampleStream(SCHEMA, STREAM, log, DeadLetterWriter(log), monotonic=lambda: now_s[0])
    while stream.poll(0.0):
        pass

    now_s[0] += 10 * STREAM.idle_after_s  # a rank has batches for so long, or waits for others
    assert (stream.is_idle, stream.is_spent) == (False, False)
    stream.poll(0.0)
    assert (stream.is_idle, stream.is_spent) == (True, True)


def test_steps_that_the_log_does_not_lead_to_are_forgotten_also_by_the_next_restart(tmp_path: Path) -> None:
    live = replace(STREAM, idle_after_s=0.1, batch=replace(STREAM.batch, max_wait_s=0.05))
    log, (of_0, of_1) = open_log(PARTITIONS), by_rank(700)
    append(log, *of_0)

    def train(world: World, until: Callable[[RankTrainer], bool]) -> int:
        trainer = rank_trainer(world, log, tmp_path, live)
        trainer.restore()
        trainer.run(lambda: until(trainer))
        return trainer.steps

    before, _ = on_ranks(2, lambda world: train(world, lambda trainer: trainer.steps > 1))
    journal = BatchJournal(tmp_path / STEPS, 1000)
    journal.resume(0)
    for lost in range(before + 1, before + 40):
        journal.add(lost, "3")  # trained on before a kill, and gone from the log since

    came: list[bool] = []

    def until(trainer: RankTrainer) -> bool:
        if trainer._world.rank == 0 and trainer._repeats.of(before + 1, 2) is None and not came:
            came.append(True)
            append(log, *of_1)
        return trainer.steps > before

    after, _ = on_ranks(2, lambda world: train(world, until))
    noted = BatchJournal(tmp_path / STEPS, 1000).resume(before)
    assert noted == list(range(before + 1, after + 1))
