"""Checkpoints that ranks write together: whole or not at all, and read by any number of ranks."""

import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from smes.arrays import Arrays
from smes.errors import CheckpointError, SchemaMismatch
from smes.events import ExampleBlock, FeedbackBlock, ImpressionBlock
from smes.model.config import OptimizerConfig
from smes.model.deltas import StateArray
from smes.model.ids import keys_of
from smes.model.learner import Learner
from smes.model.rows_config import RowsConfig
from smes.model.shards import owner_of
from smes.world import World
from stream.dead_letters import DeadLetterWriter
from stream.example_stream import ExampleStream
from stream.join.joiner import join_sources
from stream.join.ledgers import StreamLedger
from stream.log.memory_log import InMemoryLog
from stream.mini_batches import Assembler
from stream.rank_shares import share_of_stream
from stream.sources import Share
from stream.topics import FEEDBACK, IMPRESSIONS
from tests.trainer.small_world import MODEL, SCHEMA, START_MS, STREAM, fill, make_trainer, open_log, train_to_the_end
from tests.trainer.test_carry_over import HOW, NOW
from tests.worlds import on_ranks
from trainer import shared_checkpoints
from trainer.arms_report import ArmTallies
from trainer.checkpoint_file import Checkpoint, CheckpointView
from trainer.checkpoints import CheckpointDirectory
from trainer.config import EvaluationConfig
from trainer.evaluation import ProgressiveEvaluation
from trainer.routing_figures import ExpertTally
from trainer.schemas_before import SchemasBefore
from trainer.shared_checkpoints import SharedCheckpoints, SharedCheckpointWriter
from trainer.training_state import Progress, TrainingState

_N = 4000
_ROWS = RowsConfig(admit_after=3, shared_rows=2, counted_sightings=2000)
_OPTIMIZER = OptimizerConfig(frequency_power=0.25)
_BY_ROW = ("table.records", "rows.vocabulary", "rows.ages.seen_s", "rows.ages.vocabulary", "rows.ages.batches")


class Rank:
    """One rank's parts of a trainer, stepped together with the others', without a loop."""

    def __init__(self, world: World, log: InMemoryLog, folder: Path, rows: RowsConfig = _ROWS) -> None:
        self.world = world
        self.learner = Learner(SCHEMA, MODEL, _OPTIMIZER, rows, device=torch.device("cpu"), seed=1, world=world)
        share = Share(world.rank, world.size)
        self.stream = ExampleStream(SCHEMA, STREAM, log, DeadLetterWriter(log), share=share)
        self.state = TrainingState(
            self.learner,
            self.stream,
            ProgressiveEvaluation(SCHEMA, EvaluationConfig(window_s=10), freeze=None, thaw=None),
            ExpertTally(self.learner.expert_limits),
            ArmTallies(SCHEMA),
            gate=None,
            rank=world.rank,
        )
        self.checkpoints = SharedCheckpoints(CheckpointDirectory(folder, keep=2), world)
        self.writer = SharedCheckpointWriter(self.checkpoints, world)
        self.trained: list[int] = []
        """Impression ids, in the order of the steps."""
        self.seen: Counter[int] = Counter()
        """How often each key of a user was looked up."""

    def restore(self) -> Checkpoint:
        found = self.checkpoints.newest(schema=SCHEMA, model=MODEL.to_dict())
        assert found is not None
        self.state.load(found)
        return found

    def save(self) -> None:
        self.writer.write(*self.view())

    def view(self) -> tuple[CheckpointView, Callable[[], None]]:
        return self.state.view("line", Progress(0, 0, None, SchemasBefore()))

    def train(self, steps: int | None = None, *, flush: bool = False) -> None:
        """Take so many joint steps; None: until no rank has a batch any more. Those without take part, too."""
        taken = 0
        while taken != steps:
            batch = self._next_batch()
            if batch is None and flush:
                self.stream.flush()
                batch = self.stream.next_batch()
            if not any(int(has) for has in self.world.gather(torch.tensor([batch is not None]).long())):
                return
            block = ExampleBlock.empty(SCHEMA) if batch is None else batch
            self.learner.step(self.learner.prepare(block))
            self.trained += block.impression_id.tolist()
            self.seen.update(keys_of(block.ids[:, 0], "user_id").tolist())
            taken += 1

    def _next_batch(self) -> ExampleBlock | None:
        while (batch := self.stream.next_batch()) is None and self.stream.poll(0):
            pass
        return batch

    def read(self) -> Arrays:
        view, _ = self.view()
        arrays = {name: array.read() for name, array in view.arrays.items()}
        view.close()
        return arrays


@dataclass
class Moment:
    """What all ranks have at one moment.

    Attributes:
        records: Key → its whole record, and what is known of its row's age.
        ledger, counts: The sums over all ranks; of events, and of rows.
        dense: Everything of the learner that is not of its rows, as rank 0 has it.
        trained, seen: Of all ranks.
    """

    records: dict[int, tuple[bytes, ...]]
    ledger: Counter[str]
    counts: Counter[str]
    dense: Arrays
    trained: list[int]
    seen: Counter[int]

    @classmethod
    def of(cls, ranks: Sequence["Part"]) -> "Moment":
        records: dict[int, tuple[bytes, ...]] = {}
        for part in ranks:
            assert not records.keys() & part.records.keys(), "a key has one owner"
            records |= part.records
            for name, array in part.dense.items():
                np.testing.assert_array_equal(array, ranks[0].dense[name], err_msg=f"{name}, alike on all ranks")
        trained = [impression for part in ranks for impression in part.trained]
        ledger, counts, seen = (_sum(getattr(part, name) for part in ranks) for name in ("ledger", "counts", "seen"))
        return cls(records, ledger, counts, ranks[0].dense, trained, seen)


@dataclass
class Part:
    """One rank's part of a :class:`Moment`."""

    records: dict[int, tuple[bytes, ...]]
    ledger: Counter[str]
    counts: Counter[str]
    dense: Arrays
    trained: list[int]
    seen: Counter[int]

    @classmethod
    def of(cls, rank: Rank) -> "Part":
        state = {name: tensor.numpy() for name, tensor in rank.learner.state().items()}
        used = np.setdiff1d(np.arange(len(state["table.keys"])), state["rows.free"])
        columns = [state[name][used] for name in _BY_ROW]
        records = {
            int(key): tuple(column[i].tobytes() for column in columns)
            for i, key in enumerate(state["table.keys"][used].tolist())
        }
        assert (owner_of(np.array(list(records)), rank.world.size) == rank.world.rank).all()
        dense = {name: array for name, array in state.items() if not name.startswith(("table.", "rows."))}
        return cls(
            records,
            counts_of(rank.stream.ledger()),
            Counter(asdict(rank.learner.row_counts)),
            dense,
            rank.trained,
            rank.seen,
        )


def moments(
    log: InMemoryLog,
    folder: Path,
    size: int,
    work: Callable[[Rank], object],
    *,
    restore: bool = True,
    rows: RowsConfig = _ROWS,
) -> tuple[Moment, Moment]:
    """What ranks have when they begin, and when each has done some work."""

    def run(world: World) -> tuple[Part, Part]:
        rank = Rank(world, log, folder, rows)
        with rank.checkpoints.locked():
            if restore:
                rank.restore()
            before = Part.of(rank)
            work(rank)
            return before, Part.of(rank)

    before, after = zip(*on_ranks(size, run), strict=True)
    return Moment.of(before), Moment.of(after)


def _sum(counters: Iterable[Counter[Any]]) -> Counter[Any]:
    return sum(counters, Counter())


def counts_of(ledger: StreamLedger) -> Counter[str]:
    """Its counts, those that are 0 too."""
    names = (name for name in ledger.__dataclass_fields__ if name != "features")
    return Counter({name: getattr(ledger, name) for name in names})


@pytest.fixture
def log() -> InMemoryLog:
    log = open_log(4)
    fill(log, _N, partitions=4)
    return log


def train_and_save(steps: int) -> Callable[[Rank], None]:
    def work(rank: Rank) -> None:
        rank.train(steps)
        rank.save()

    return work


def test_any_number_of_ranks_goes_on_from_what_any_other_has_written(log: InMemoryLog, tmp_path: Path) -> None:
    """1 → 2 → 4 → 2 → 1 ranks: the same rows by key, bit for bit; every impression once, every event in the ledger."""
    _, last = moments(log, tmp_path, 1, train_and_save(9), restore=False)
    trained, seen = last.trained, last.seen
    for size, steps in ((2, 5), (4, 4), (2, 5)):
        begun, then = moments(log, tmp_path, size, train_and_save(steps))
        assert begun.records == last.records
        assert begun.ledger == last.ledger
        for name, array in begun.dense.items():
            np.testing.assert_array_equal(array, last.dense[name], err_msg=name)
        assert then.ledger["waiting"] > 0
        assert then.ledger["feedback_waiting"] > 0
        trained, seen, last = trained + then.trained, seen + then.seen, then
    _, end = moments(log, tmp_path, 1, lambda rank: rank.train(flush=True))
    trained, seen = trained + end.trained, seen + end.seen

    assert sorted(trained) == list(range(_N))
    _, alone = moments(log, tmp_path / "alone", 1, lambda rank: rank.train(flush=True), restore=False)
    assert end.ledger == alone.ledger
    often = {key for key, count in seen.items() if count >= 3}
    assert often <= end.records.keys(), "sightings are never counted too low"


def test_ages_and_counts_of_rows_go_on_where_rows_are_given_back(log: InMemoryLog, tmp_path: Path) -> None:
    rows = RowsConfig(budget=60, expire_after_s=3)
    _, last = moments(log, tmp_path, 2, train_and_save(12), restore=False, rows=rows)
    for size in (3, 1):
        begun, then = moments(log, tmp_path, size, train_and_save(4), rows=rows)
        assert (begun.records, begun.counts) == (last.records, last.counts)
        last = then
    counts = last.counts
    assert min(counts["expired"], counts["replaced"]) > 0
    assert counts["in_use"] == counts["born"] - counts["expired"] - counts["replaced"] <= 60


def test_as_many_ranks_go_on_as_if_nothing_had_happened(log: InMemoryLog, tmp_path: Path) -> None:
    """Killed after three more steps: the same bits as the ranks that were not. Meanwhile one part took its time."""
    go_on = threading.Event()

    def slow(array: StateArray) -> StateArray:
        def pieces() -> Iterator[NDArray[Any]]:
            assert go_on.wait(60)
            yield from array.pieces()

        return StateArray(array.dtype, array.shape, pieces)

    def never_killed(world: World) -> tuple[Arrays, list[int]]:
        rank, saved = Rank(world, log, tmp_path), []
        rank.train(5)
        view, _ = rank.view()
        if world.rank == 1:
            view = replace(view, arrays={**view.arrays, "learner.table.keys": slow(view.arrays["learner.table.keys"])})
        rank.writer.start(view, lambda: saved.append(rank.learner.step_number))
        while not saved:
            assert rank.writer.is_busy
            assert not list(tmp_path.glob("*.ranks.json"))
            rank.train(1)
            if rank.learner.step_number == 8:
                state = rank.read()
                go_on.set()
            reports = torch.cat(world.gather(torch.tensor([rank.writer.report()]))).tolist()
            rank.writer.hear(reports)
        assert not rank.writer.is_busy
        return state, saved

    def killed(world: World) -> Arrays:
        rank = Rank(world, log, tmp_path)
        assert rank.restore().on_disk
        rank.train(3)
        return rank.read()

    never = on_ranks(2, never_killed)
    for (state, saved), again in zip(never, on_ranks(2, killed), strict=True):
        assert len(saved) == 1
        assert state.keys() == again.keys()
        for name in (name for name in state if name.startswith("learner.")):  # how far a stream has read is its own
            np.testing.assert_array_equal(state[name], again[name], err_msg=name)


def saved(log: InMemoryLog, folder: Path, size: int = 2) -> list[int]:
    """Ranks that save after 2, 3 and 4 steps; the steps of the checkpoints that are kept."""

    def run(world: World) -> None:
        rank = Rank(world, log, folder)
        with rank.checkpoints.locked():
            for steps in (2, 1, 1):
                rank.train(steps)
                rank.save()

    on_ranks(size, run)
    return steps_in(folder)


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints of ranks in a folder; every file belongs to one of them."""
    kept = sorted(path.name for path in folder.glob("*.json"))
    parts = [part["name"] for name in kept for part in json.loads((folder / name).read_text())["parts"]]
    assert sorted(path.name for path in folder.glob("*.safetensors")) == sorted(parts)
    return [int(name.split("-")[1]) for name in kept]


def flip_in(what: str) -> Callable[[Path], None]:
    """Flips a bit within the last quarter of the newest file of which this is in the name."""

    def damage(folder: Path) -> None:
        path = max(path for path in folder.iterdir() if what in path.name)
        data = bytearray(path.read_bytes())
        data[-len(data) // 4] ^= 4
        path.write_bytes(data)

    return damage


def cut_manifest(folder: Path) -> None:
    path = max(folder.glob("*.json"))
    path.write_bytes(path.read_bytes()[:-40])


def lose_manifest(folder: Path) -> None:
    """As after a power cut: all parts were written, the manifest was not."""
    max(folder.glob("*.json")).unlink()


def lose_part(folder: Path) -> None:
    max(folder.glob("*.rank-1-of-2.safetensors")).unlink()


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("damage", [flip_in("rank-0"), flip_in("rank-1"), cut_manifest, lose_manifest, lose_part])
def test_what_is_damaged_or_not_finished_gives_way_to_the_checkpoint_before_it_on_every_rank(
    stored: Path, tmp_path: Path, damage: Callable[[Path], None], size: int
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(stored, folder)
    damage(folder)

    def newest(world: World) -> int:
        checkpoints = SharedCheckpoints(CheckpointDirectory(folder, keep=2), world)
        with checkpoints.locked():
            found = checkpoints.newest(schema=SCHEMA, model=MODEL.to_dict())
            assert found is not None
            return found.step

    assert on_ranks(size, newest) == [3] * size
    found = CheckpointDirectory(folder, keep=2).newest(schema=SCHEMA, model=MODEL.to_dict())
    assert found is not None
    assert found.step == 3
    if damage is lose_manifest:
        assert steps_in(folder) == [3], "parts that nobody names are gone when a training begins"


def test_a_command_reads_only_what_it_asks_for_of_all_ranks(stored: Path) -> None:
    parts = set(stored.glob("*.safetensors"))
    directory = CheckpointDirectory(stored, keep=2)

    found = directory.newest(schema=SCHEMA, model=MODEL.to_dict(), only=("stream.", "trainer."))

    assert found is not None
    assert not any(name.startswith("learner.") for name in found.arrays)
    positions = {name for name in found.arrays if name.endswith("/position")}
    assert positions == {f"stream.{topic}/{p}/position" for topic in (IMPRESSIONS, FEEDBACK) for p in range(4)}
    assert found.arrays["trainer.trained"].tolist() == [0, 0]
    assert parts == set(stored.glob("*.safetensors")), "reading removes nothing"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of steps 3 and 4 of two ranks."""
    log, folder = open_log(4), tmp_path_factory.mktemp("stored")
    fill(log, 2000, partitions=4)
    assert saved(log, folder) == [3, 4]
    return folder


def test_ranks_keep_as_many_checkpoints_as_one_and_remove_those_of_one(log: InMemoryLog, tmp_path: Path) -> None:
    trainer = make_trainer(log, tmp_path)
    while not trainer.step():
        trainer.stream.poll(0)
    trainer.checkpoint()
    assert len(list(tmp_path.glob("*.safetensors"))) == 1

    assert saved(log, tmp_path) == [3, 4]

    trainer.checkpoint()
    assert [path.name for path in tmp_path.glob("*1-00000005.safetensors")], "sequence numbers go on"
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_a_trainer_goes_on_from_what_ranks_wrote_and_they_from_its_own(log: InMemoryLog, tmp_path: Path) -> None:
    """With windows that frozen weights score: what they compare with belongs to rows as one rank had numbered them."""
    first = make_trainer(log, tmp_path)
    while first.learner.step_number < 5:
        assert first.step() or first.stream.poll(0)
    first.checkpoint()
    assert any(name.startswith("evaluation.frozen.") for name in first.view().arrays)
    scored = first.evaluation.progressive()["click"].examples

    moments(log, tmp_path, 2, train_and_save(2), rows=RowsConfig())

    second = make_trainer(log, tmp_path)
    assert second.restore() == 7
    assert second.lineage == "line"
    assert CheckpointDirectory(tmp_path, keep=2).entries()[0].path.suffix == ".safetensors", "written anew at once"
    assert second.evaluation.progressive()["click"].examples == scored
    train_to_the_end(second)
    assert second.evaluation.progressive()["click"].examples > scored
    third = make_trainer(log, tmp_path)
    assert third.restore() == 7


def test_a_rank_whose_disk_refuses_ends_that_checkpoint_for_all(
    log: InMemoryLog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def full() -> Iterator[NDArray[Any]]:
        raise OSError(28, "No space left on device")

    def run(world: World) -> list[str]:
        rank, saved, said = Rank(world, log, tmp_path), [], []
        rank.train(1)
        rank.save()
        for refuses in (1, 0):
            view, _ = rank.view()
            if world.rank == refuses:
                keys = view.arrays["learner.table.keys"]
                view = replace(view, arrays={**view.arrays, "x": StateArray(keys.dtype, keys.shape, full)})
            try:
                rank.writer.write(view, lambda: saved.append(0))
            except CheckpointError as error:
                said.append(str(error))
            assert not rank.writer.is_busy
        assert (saved, rank.writer.failures) == ([], 2)
        rank.save()
        return said

    other, own = on_ranks(2, run)
    assert "not written by rank 1" in other[0]
    assert "No space left" in own[0]
    assert "No space left" in other[1]
    assert "not written by rank 0" in own[1]
    assert len(steps_in(tmp_path)) == 2


def test_a_manifest_that_cannot_be_written_for_any_reason_ends_that_checkpoint_for_all(
    log: InMemoryLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(shared_checkpoints, "write_manifest", no_memory)

    def run(world: World) -> str:
        rank = Rank(world, log, tmp_path)
        rank.train(1)
        with pytest.raises(CheckpointError) as refused:
            rank.save()
        return str(refused.value)

    own, other = on_ranks(2, run)
    assert "MemoryError" in own
    assert "not written by rank 0" in other
    assert not list(tmp_path.glob("step-*"))


def test_one_training_at_a_time_and_one_folder_for_all_ranks(
    log: InMemoryLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def enter(folder: Callable[[World], Path]) -> Callable[[World], str]:
        def run(world: World) -> str:
            checkpoints = SharedCheckpoints(CheckpointDirectory(folder(world), keep=2), world)
            try:
                with checkpoints.locked():
                    return "entered"
            except CheckpointError as error:
                return str(error)

        return run

    assert on_ranks(2, enter(lambda world: tmp_path)) == ["entered"] * 2
    with CheckpointDirectory(tmp_path, keep=2).locked():
        refused = on_ranks(2, enter(lambda world: tmp_path))
    assert refused[0] == refused[1]
    assert "held by process" in refused[0]
    monkeypatch.setattr("trainer.shared_checkpoints._VISIBLE_S", 0.1)
    apart = on_ranks(2, enter(lambda world: tmp_path / str(world.rank)))
    assert apart[0] == apart[1]
    assert "rank 1 on" in apart[0]
    assert "one folder for all ranks" in apart[0]


def test_parts_of_two_moments_never_become_one_checkpoint(log: InMemoryLog, tmp_path: Path) -> None:
    def run(world: World) -> str:
        rank = Rank(world, log, tmp_path)
        rank.train(1)
        view, on_saved = rank.view()
        view = replace(view, step=view.step + world.rank)
        try:
            rank.writer.write(view, on_saved)
        except CheckpointError as error:
            return str(error)
        return ""

    assert on_ranks(2, run) == ["checkpoint: the ranks are at steps [1, 2], expected all at one"] * 2
    assert steps_in(tmp_path) == []


def test_another_schema_or_model_is_refused_on_every_rank(stored: Path) -> None:
    def run(world: World) -> str:
        checkpoints = SharedCheckpoints(CheckpointDirectory(stored, keep=2), world)
        with pytest.raises(CheckpointError, match="differs in: embedding_dim"):
            checkpoints.newest(schema=SCHEMA, model={**MODEL.to_dict(), "embedding_dim": 4})
        with pytest.raises(SchemaMismatch) as refused:
            checkpoints.newest(schema=NOW, model=MODEL.to_dict())
        return str(refused.value)

    first, second = on_ranks(2, run)
    assert "smes train --change-schema goes on from it" in first
    assert second


def test_ranks_carry_a_checkpoint_over_to_another_schema_as_one_trainer_does(stored: Path) -> None:
    whole = CheckpointDirectory(stored, keep=2).newest(schema=NOW, model=MODEL.to_dict(), any_schema=True)
    assert whole is not None
    how = replace(HOW, optimizer=_OPTIMIZER, rows=_ROWS)
    alone = how(whole)

    def run(world: World) -> Arrays:
        found = SharedCheckpoints(CheckpointDirectory(stored, keep=2), world).newest(
            schema=NOW, model=MODEL.to_dict(), carried_over=how
        )
        assert found is not None
        assert (found.on_disk, found.step) == (False, alone.step)
        return found.arrays

    parts = on_ranks(2, run)
    keys = np.concatenate([arrays["learner.table.keys"] for arrays in parts])
    records = np.concatenate([arrays["learner.table.records"] for arrays in parts])
    order, expected = np.argsort(keys), np.argsort(alone.arrays["learner.table.keys"])
    np.testing.assert_array_equal(keys[order], alone.arrays["learner.table.keys"][expected])
    np.testing.assert_array_equal(records[order], alone.arrays["learner.table.records"][expected])


def test_what_belongs_together_but_lies_in_partitions_of_two_ranks_is_counted_once() -> None:
    """Feedback of one rank on an impression of the other, and an impression that both have."""
    streams = [
        Assembler(SCHEMA, STREAM.join, STREAM.batch, [s for s in join_sources(2) if s.partition == p]) for p in (0, 1)
    ]
    for p, assembler in enumerate(streams):
        shown, feedback = ImpressionBlock.empty(SCHEMA, 2), FeedbackBlock.empty(2)
        shown.impression_id[:] = [9, 20 + p]
        shown.event_time_ms[:] = START_MS
        shown.partition[:] = feedback.partition[:] = p
        feedback.impression_id[:] = [21 - p, 20 + p]  # on the other's, on its own
        feedback.value[:] = 1
        feedback.event_time_ms[:] = START_MS + 100
        assembler.push(shown, feedback)
    whole = Assembler(SCHEMA, STREAM.join, STREAM.batch, 2)

    whole.load_state(share_of_stream([stream.state() for stream in streams], 0, 1))

    ledger = whole.ledger()
    assert (ledger.impressions, ledger.waiting, ledger.duplicate) == (4, 3, 1)
    assert (ledger.feedback, ledger.attached, ledger.orphaned, ledger.feedback_waiting) == (4, 2, 2, 0)
    whole.flush()
    batch = whole.next_batch()
    assert batch is not None
    assert sorted(batch.impression_id.tolist()) == [9, 20, 21]
    assert batch.labels[np.argsort(batch.impression_id), 0].tolist() == [0, 1, 1]
