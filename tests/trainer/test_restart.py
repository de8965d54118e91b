"""A trainer killed anywhere and started again ends with the weights, metrics and counts of one never killed."""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from smes.errors import CheckpointError, ModelMismatch, SchemaMismatch
from smes.model.config import OptimizerConfig
from smes.model.rows_config import RowRules, RowsConfig
from stream.log.memory_log import InMemoryLog
from tests.running import until
from tests.trainer.small_world import MODEL, fill, make_learner, make_trainer, open_log, train_to_the_end
from trainer.checkpoint_file import CheckpointView
from trainer.checkpoints import CheckpointDirectory
from trainer.loop import CHECKPOINT, Trainer
from trainer.report import conservation_errors
from trainer.routing_figures import routing_report, routing_summary
from trainer.routing_history import RoutingHistoryConfig
from trainer.run_report import training_report
from trainer.schedule import Flags


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def log() -> InMemoryLog:
    return open_log()


_SHORT_LIVES = RowsConfig(
    admit_after=2, shared_rows=2, budget=40, vocabularies={"user_id": RowRules(expire_after_s=2, budget=25)}
)
_FORGETFUL = OptimizerConfig(accumulator_half_life_s=5, frequency_power=0.2)


def trainer_of(
    log: InMemoryLog, checkpoints: Path | None, *, prefetch: bool | None = None, short_lives: bool = False
) -> Trainer:
    """A trainer whose routing history ends segments often, and merges some.

    With ``short_lives``, rows come and go, and accumulators forget.
    """
    routing = RoutingHistoryConfig(first_steps=3, most_segments=6)
    learner = make_learner(rows=_SHORT_LIVES, optimizer=_FORGETFUL) if short_lives else None
    return make_trainer(log, checkpoints, prefetch=prefetch, routing=routing, learner=learner)


def assert_same(one: Trainer, other: Trainer) -> None:
    state, expected = one.learner.state(), other.learner.state()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
    report, wanted = (training_report(t, seconds=1, trained=1).to_dict() for t in (one, other))
    assert {**report, "lineage": None} == {**wanted, "lineage": None}
    assert conservation_errors(report) == []
    assert one.experts.summary() == other.experts.summary()
    routing, wanted_routing = (
        routing_report(t.experts.history, t.learner.expert_limits, ["click", "like", "watch"]) for t in (one, other)
    )
    assert routing == wanted_routing
    assert len(routing["segments"]) > 3
    assert routing["segments"][1]["drift"] is not None
    assert one.experts.routing() == routing_summary(one.experts.history, one.learner.expert_limits)


@pytest.mark.parametrize("short_lives", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_killed_anywhere_it_goes_on_bit_for_bit(seed: int, short_lives: bool, log: InMemoryLog, tmp_path: Path) -> None:
    fill(log, 3000)
    never_killed = trainer_of(log, None, short_lives=short_lives)
    train_to_the_end(never_killed)
    assert never_killed.learner.step_number > 20
    assert (never_killed.learner.num_rows < 80) == short_lives, "of some 110 ids"

    chance = random.Random(seed)
    lives = 0
    while True:
        lives += 1
        trainer = trainer_of(log, tmp_path, short_lives=short_lives)
        resumed = trainer.restore()
        assert (resumed is None) == (lives == 1)
        trainer.checkpoint()
        killed = False
        while not killed and (trainer.step() or trainer.stream.poll(0)):
            if chance.random() < 0.3:
                trainer.checkpoint()
            killed = chance.random() < 0.08  # everything since the checkpoint is lost
        if not killed:
            break
    assert lives > 1
    assert_same(trainer, never_killed)


def test_the_first_cut_after_a_restart_says_what_the_last_one_before_it_said(log: InMemoryLog, tmp_path: Path) -> None:
    fill(log, 3000)
    for steps in (0, 3):
        trainer = trainer_of(log, tmp_path)
        while trainer.learner.step_number < steps:
            assert trainer.step() or trainer.stream.poll(0)
        trainer.checkpoint()
        last = trainer.take_cut(full=True)
        again = trainer_of(log, tmp_path)
        again.restore()
        first = again.take_cut(full=True)

        assert (last.event_time_ms is None) == (steps == 0)
        assert (first.step, first.event_time_ms, first.positions) == (last.step, last.event_time_ms, last.positions)
        assert first.metrics == last.metrics
        for cut in (first, last):
            cut.without_view()


@pytest.mark.parametrize("steps_beside", [1, 7])
def test_a_checkpoint_written_beside_the_training_is_of_the_moment_it_was_begun(
    steps_beside: int, log: InMemoryLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writer reads nothing until the trainer has taken more steps; then the trainer is killed."""
    fill(log, 3000)
    never_killed = trainer_of(log, None)
    train_to_the_end(never_killed)
    flags, go_on, save_now = Flags(), threading.Event(), CheckpointDirectory.save

    def save_later(self: CheckpointDirectory, checkpoint: CheckpointView) -> Path:
        assert go_on.wait(60)
        return save_now(self, checkpoint)

    monkeypatch.setattr(CheckpointDirectory, "save", save_later)
    trainer = make_trainer(log, tmp_path, flags=flags, routing=RoutingHistoryConfig(first_steps=3, most_segments=6))
    begun = 0
    for begin_at in (10, 20):
        take_steps(trainer, begin_at - trainer.learner.step_number)
        flags.request(CHECKPOINT)
        trainer.run_requested()
        begun = begin_at
        take_steps(trainer, steps_beside)
        flags.request(CHECKPOINT)  # one at a time: it is not begun while the other is written
        trainer.run_requested()
        assert flags.take(CHECKPOINT)
        go_on.set()
        until_saved(tmp_path, begun)
        go_on.clear()

    monkeypatch.setattr(CheckpointDirectory, "save", save_now)
    again = trainer_of(log, tmp_path)
    assert again.restore() == begun
    train_to_the_end(again)
    assert_same(again, never_killed)


def take_steps(trainer: Trainer, steps: int) -> None:
    while steps:
        if trainer.step():
            steps -= 1
        else:
            trainer.stream.poll(0)


def until_saved(folder: Path, step: int) -> None:
    until(lambda: any(f"step-{step:012d}-" in path.name for path in folder.glob("*.safetensors")), "the checkpoint")


def test_batches_sent_ahead_change_nothing(log: InMemoryLog, tmp_path: Path) -> None:
    """Batches are sent ahead as on a GPU, here on the CPU: same weights, also over a restart at every tenth step."""
    fill(log, 3000)
    plain = trainer_of(log, None)
    train_to_the_end(plain)
    ahead = trainer_of(log, tmp_path, prefetch=True)
    while ahead.step() or ahead.stream.poll(0):
        if ahead.learner.step_number % 10 == 9:
            ahead.checkpoint()
            ahead = trainer_of(log, tmp_path, prefetch=True)
            assert ahead.restore()
            ahead.step()
    assert_same(ahead, plain)


def test_a_clean_stop_loses_nothing(log: InMemoryLog, tmp_path: Path) -> None:
    fill(log, 2500)
    never_stopped = trainer_of(log, None)
    train_to_the_end(never_stopped)

    first = trainer_of(log, tmp_path)
    steps = iter(range(7))
    first.run(should_stop=lambda: next(steps, None) is None)
    assert first.learner.step_number < never_stopped.learner.step_number
    second = trainer_of(log, tmp_path)
    assert second.restore() == first.learner.step_number
    assert second.lineage == first.lineage
    train_to_the_end(second)
    assert_same(second, never_stopped)


@pytest.fixture
def well_trained(log: InMemoryLog) -> Trainer:
    fill(log, 6000)
    trainer = trainer_of(log, None)
    train_to_the_end(trainer)
    trainer.settle()
    return trainer


def test_it_learns(well_trained: Trainer) -> None:
    click = well_trained.evaluation.report()["click"]
    assert click.auc is not None
    assert click.auc > 0.6


def test_every_example_executes_experts_within_the_bound(well_trained: Trainer) -> None:
    trainer = well_trained
    assert trainer.experts.instances == trainer.trained
    bound = MODEL.smes.num_shared + 3 * MODEL.smes.num_adaptive
    assert trainer.experts.max is not None
    assert MODEL.smes.num_shared + MODEL.smes.num_adaptive <= trainer.experts.max <= bound


def test_a_damaged_checkpoint_yields_to_the_one_before(log: InMemoryLog, tmp_path: Path) -> None:
    fill(log, 2500)
    trainer = trainer_of(log, tmp_path)
    trainer.stream.poll(0)
    trainer.checkpoint()
    train_to_the_end(trainer)
    trainer.checkpoint()
    newest = max(tmp_path.glob("*.safetensors"), key=lambda path: path.stem[-8:])
    newest.write_bytes(newest.read_bytes()[:1000])

    assert trainer_of(log, tmp_path).restore() == 0


def test_a_folder_of_damaged_checkpoints_is_refused(log: InMemoryLog, tmp_path: Path) -> None:
    trainer_of(log, tmp_path).checkpoint()
    for path in tmp_path.iterdir():
        path.write_bytes(b"no checkpoint")

    with pytest.raises(CheckpointError, match="none can be read"):
        trainer_of(log, tmp_path).restore()


def test_another_schema_is_refused(log: InMemoryLog, tmp_path: Path) -> None:
    trainer = trainer_of(log, tmp_path)
    trainer.checkpoint()
    directory, was = CheckpointDirectory(tmp_path, 2), trainer.learner.schema
    now = replace(was, features=was.features[:-1])
    hashes = f"{was.hash} differs from the configured schema's {now.hash}"

    with pytest.raises(SchemaMismatch, match=f"{hashes}; configured: no feature '{was.features[-1].name}' any more"):
        directory.newest(schema=now, model=MODEL.to_dict())


def test_another_model_is_refused_with_the_keys_that_differ(log: InMemoryLog, tmp_path: Path) -> None:
    trainer = trainer_of(log, tmp_path)
    trainer.checkpoint()
    smes = replace(MODEL.smes, experts=replace(MODEL.smes.experts, num=8), router=replace(MODEL.smes.router, rank=4))
    other = replace(MODEL, embedding_dim=4, smes=smes)

    with pytest.raises(ModelMismatch, match=r"differs in: embedding_dim, smes\.experts\.num, smes\.router\.rank\)"):
        CheckpointDirectory(tmp_path, 2).newest(schema=trainer.learner.schema, model=other.to_dict())


@pytest.mark.parametrize(("written", "number"), [("smes-checkpoint-1", "1"), ("5", "5"), ("7", "7"), (None, "none")])
def test_another_format_is_refused_by_its_number_and_not_skipped(
    written: str | None, number: str, log: InMemoryLog, tmp_path: Path
) -> None:
    trainer = trainer_of(log, tmp_path)
    trainer.checkpoint()
    newer = tmp_path / "step-000000000009-00000002.safetensors"
    newer.write_bytes(save({"weights": np.zeros(3)}, {} if written is None else {"format": written}))

    with pytest.raises(
        CheckpointError, match=rf"checkpoint .*000009-00000002\.safetensors: format {number}, expected 6"
    ):
        trainer_of(log, tmp_path).restore()


@contextmanager
def short_files() -> Iterator[None]:
    """Longer files than 4 KiB are refused in this context, as by a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_refuses_is_named_and_the_old_checkpoint_stays(log: InMemoryLog, tmp_path: Path) -> None:
    trainer = trainer_of(log, tmp_path)
    trainer.checkpoint()

    with short_files(), pytest.raises(CheckpointError, match="not written: File too large"):
        trainer.checkpoint()

    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    assert trainer_of(log, tmp_path).restore() == 0


def test_metrics_are_those_of_scores_before_each_step(log: InMemoryLog) -> None:
    """AUC of what the weights said before training, recomputed outside, by scikit-learn."""
    from sklearn.metrics import roc_auc_score

    from smes.model.serving import ServingModel

    fill(log, 2500)
    trainer = trainer_of(log, None)
    labels, scores = [], []
    while trainer.stream.poll(0) or trainer.stream.upcoming() is not None:
        while (examples := trainer.stream.upcoming()) is not None:
            # Rows exist (untrained) by the time a batch is scored, as in the step itself.
            trainer.learner.prepare(examples)
            before = ServingModel.from_state(trainer.learner.schema, MODEL, trainer.learner.serving_state())
            scores.append(before.score(examples.ids, examples.numerics))
            labels.append(examples.labels)
            trainer.step()
    trainer.settle()
    click = trainer.evaluation.report()["click"]
    expected = roc_auc_score(np.concatenate(labels)[:, 0], np.concatenate(scores)[:, 0])
    assert click.auc == pytest.approx(expected, abs=2e-4)
