"""Several ranks over one log: one ledger, one cut, and after a restart the same steps, also where the clock chose them.

The ranks are threads of this process, which talk over real sockets.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from smes.errors import EventLogError, RankFailed
from smes.events import FeedbackBlock, ImpressionBlock
from smes.model.config import OptimizerConfig
from smes.model.learner import Learner
from smes.world import World
from stream.batch_journal import STEPS, BatchJournal, name_of
from stream.codec.codec import encode_feedback, encode_impressions
from stream.config import StreamConfig
from stream.dead_letters import DeadLetterWriter
from stream.example_stream import ExampleStream
from stream.join.ledgers import StreamLedger
from stream.log.memory_log import InMemoryLog
from stream.sources import Share
from stream.topics import FEEDBACK, IMPRESSIONS, partition_of
from tests.fixtures.stored import digest
from tests.trainer.small_world import MODEL, SCHEMA, START_MS, STREAM, events, fill, make_trainer, open_log
from tests.worlds import on_ranks
from trainer.checkpoints import CheckpointDirectory
from trainer.config import EvaluationConfig
from trainer.evaluation import ProgressiveEvaluation
from trainer.loop import CHECKPOINT
from trainer.rank_loop import RankTrainer
from trainer.schedule import Flags
from trainer.shared_checkpoints import SharedCheckpoints

PARTITIONS = 4


def rank_trainer(
    world: World, log: InMemoryLog, folder: Path | None = None, stream: StreamConfig = STREAM, keep: int = 1000
) -> RankTrainer:
    """A rank's trainer that has trained on nothing yet; batches are as large together as those of one."""
    letters, shared = DeadLetterWriter(log), None
    if folder is not None:
        shared = SharedCheckpoints(CheckpointDirectory(folder, keep=keep), world)
    own = replace(stream, batch=replace(stream.batch, size=stream.batch.size // world.size))
    by_clock = own.batch.max_wait_s is not None
    return RankTrainer(
        world,
        Learner(SCHEMA, MODEL, OptimizerConfig(), device=torch.device("cpu"), seed=1, world=world),
        ExampleStream(
            SCHEMA,
            own,
            log,
            letters,
            share=Share(world.rank, world.size),
            journal=BatchJournal(folder / name_of(world.rank, world.size), keep) if folder and by_clock else None,
        ),
        ProgressiveEvaluation(SCHEMA, EvaluationConfig(window_s=10), freeze=None, thaw=None),
        Flags(),
        open_part=lambda: pytest.fail("nothing is published"),
        checkpoints=shared,
        journal=BatchJournal(folder / STEPS, keep) if folder and world.rank == 0 else None,
        live_by_clock=by_clock,
        dead_letters=letters.write,
    )


def everything(trainer: RankTrainer) -> str:
    """Digest of what a restart of a rank needs of weights and stream."""
    state = {f"learner.{name}": tensor.numpy() for name, tensor in trainer.learner.state().items()}
    return digest(state | trainer.stream.state())


@dataclass
class Ended:
    """How a rank's training ended."""

    ledger: StreamLedger
    trained: int
    steps: int
    digest: str
    positives: dict[str, int]


def ended(trainer: RankTrainer) -> Ended:
    """Of a trainer that has run."""
    positives = {name: metrics.positives for name, metrics in trainer.evaluation.progressive().items()}
    return Ended(trainer.stream.ledger(), trainer.trained, trainer.steps, everything(trainer), positives)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_together_read_and_train_on_what_one_does(size: int) -> None:
    log = open_log(PARTITIONS)
    fill(log, 900, partitions=PARTITIONS)
    alone = make_trainer(log, None)
    alone.run(lambda: True, flush=True)

    def work(world: World) -> Ended:
        trainer = rank_trainer(world, log)
        trainer.run(lambda: True, flush=True)
        return ended(trainer)

    ranks = on_ranks(size, work)

    assert ranks[0].ledger == alone.stream.ledger()
    assert [rank.trained for rank in ranks] == [alone.trained] * size
    assert ranks[0].positives == {name: task.positives for name, task in alone.evaluation.report().items()}
    assert ranks[0].positives["click"] > 0
    assert len({rank.steps for rank in ranks}) == 1


def test_more_ranks_than_partitions_are_refused() -> None:
    log = open_log(2)

    with pytest.raises(ValueError, match="3 ranks: topic 'impressions' has 2 partitions, expected at least one for"):
        ExampleStream(SCHEMA, STREAM, log, DeadLetterWriter(log), share=Share(0, 3))


def by_rank(n: int) -> list[tuple[ImpressionBlock, FeedbackBlock]]:
    """Events of the partitions of each of two ranks, over 50 ms of event time for each impression."""
    impressions, feedback = events(n, longest_delay_ms=800)
    for block in (impressions, feedback):
        block.event_time_ms[:] = START_MS + 5 * (block.event_time_ms - START_MS)
    shares = []
    for rank in range(2):
        of_rank = [partition_of(block.impression_id, PARTITIONS) % 2 == rank for block in (impressions, feedback)]
        shares.append((impressions.take(of_rank[0]), feedback.take(of_rank[1])))
    return shares


def append(log: InMemoryLog, impressions: ImpressionBlock, feedback: FeedbackBlock) -> None:
    """Append events to the partitions of their ids."""
    log.append(IMPRESSIONS, encode_impressions(impressions, SCHEMA, "json", PARTITIONS))
    log.append(FEEDBACK, encode_feedback(feedback, SCHEMA, "json", PARTITIONS))


def test_a_restart_repeats_steps_that_the_clock_gave_to_some_ranks_alone(tmp_path: Path) -> None:
    """Events of rank 1 come when rank 0 has trained on its own for some steps. After the restart they are all there."""
    live = replace(STREAM, idle_after_s=0.3, batch=replace(STREAM.batch, max_wait_s=0.1))
    log, (of_0, of_1) = open_log(PARTITIONS), by_rank(700)
    append(log, *of_0)
    alone_for = 4

    def train(world: World, until: Callable[[RankTrainer], bool]) -> tuple[int | None, Ended]:
        trainer = rank_trainer(world, log, tmp_path, live)
        began = trainer.restore()

        def should_stop() -> bool:
            if world.rank == 0 and trainer.steps == alone_for and not came:
                came.append(True)
                append(log, *of_1)
            return until(trainer)

        trainer.run(should_stop, flush=False)
        return began, ended(trainer)

    came: list[bool] = []
    total = len(of_0[0]) + len(of_1[0])
    first = on_ranks(2, lambda world: train(world, lambda trainer: trainer.trained >= total // 2))
    masks = [line.split()[1] for line in (tmp_path / STEPS).read_text().splitlines()]
    assert masks[:alone_for] == ["1"] * alone_for
    assert "3" in masks or "2" in masks

    manifests = sorted(tmp_path.glob("*.ranks.json"))
    assert len(manifests) > 1, "one after the first step, one at the end"
    for later in manifests[1:]:
        later.unlink()
    steps = first[0][1].steps
    again = on_ranks(2, lambda world: train(world, lambda trainer: trainer.steps >= steps))

    assert all(began is not None and began <= alone_for for began, _ in again)
    assert [rank.steps for _, rank in again] == [steps, steps]
    assert [rank.digest for _, rank in again] == [rank.digest for _, rank in first]


def test_an_error_of_one_rank_ends_all_at_one_step_with_a_checkpoint(tmp_path: Path) -> None:
    log = open_log(PARTITIONS)
    for of_rank in by_rank(400):
        append(log, *of_rank)

    def work(world: World) -> str:
        trainer = rank_trainer(world, log, tmp_path)
        read = trainer._own.poll

        def poll(timeout_s: float) -> int:
            if world.rank == 1 and trainer.steps:
                raise EventLogError("the log of rank 1 is gone")
            return read(timeout_s)

        trainer._own.poll = poll  # type: ignore[method-assign]  # a broker that fails for one of two clients
        with pytest.raises(EventLogError if world.rank == 1 else RankFailed, match="rank 1"):
            trainer.run(lambda: False)
        assert trainer.steps
        return everything(trainer)

    digests = on_ranks(2, work)

    def restored(world: World) -> str:
        trainer = rank_trainer(world, log, tmp_path)
        assert trainer.restore() is not None
        return everything(trainer)

    assert on_ranks(2, restored) == digests


def test_a_rank_that_waits_for_its_event_log_holds_up_neither_checkpoints_nor_a_stop(tmp_path: Path) -> None:
    log = open_log(PARTITIONS)
    for of_rank in by_rank(400):
        append(log, *of_rank)
    away = threading.Event()

    def work(world: World) -> tuple[int, int, str]:
        trainer = rank_trainer(world, log, tmp_path)
        read, seen = trainer._own.poll, [0, 0]  # turns of the outage, checkpoints that came in it

        def poll(timeout_s: float) -> int:
            if world.rank == 1 and trainer.steps and not seen[0]:
                away.set()
                before = len(list(tmp_path.glob("*.ranks.json")))
                while seen[0] < 1000 and not trainer._is_stopping:
                    trainer.take_part()  # as trainer.waits does while the log is away
                    seen[0] += 1
                seen[1] = len(list(tmp_path.glob("*.ranks.json"))) - before
            return read(timeout_s)

        trainer._own.poll = poll  # type: ignore[method-assign]  # a broker that is away for one of two clients
        asked: list[int] = []

        def should_stop() -> bool:
            written = len(list(tmp_path.glob("*.ranks.json")))
            if away.is_set() and world.rank == 0 and trainer.writer is not None and not trainer.writer.is_busy:
                if not asked:
                    trainer._flags.request(CHECKPOINT)
                asked.append(written)
            return len(asked) > 3 and written > asked[0]

        trainer.run(should_stop, drain=True)
        return seen[0], seen[1], everything(trainer)

    (_, _, first), (turns, checkpoints, second) = on_ranks(2, work)

    assert 0 < turns < 1000
    assert checkpoints > 0

    def undisturbed(world: World) -> str:
        trainer = rank_trainer(world, log)
        trainer.run(lambda: True, drain=True)
        return everything(trainer)

    assert on_ranks(2, undisturbed) == [first, second]
