"""A trainer killed anywhere and started again ends with the weights, metrics and counts of one never killed."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from smes.errors import CheckpointError, SchemaMismatch
from stream.log.memory_log import InMemoryLog
from tests.trainer.small_world import MODEL, fill, make_trainer, open_log
from trainer.checkpoints import CheckpointDirectory
from trainer.loop import Trainer
from trainer.report import conservation_errors, training_report
from trainer.routing_figures import routing_report, routing_summary


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the routing's history has ends of stretches anywhere, and joins some."""
    monkeypatch.setattr("trainer.routing_history.FIRST_STEPS", 3)
    monkeypatch.setattr("trainer.routing_history.MOST_STRETCHES", 6)


@pytest.fixture
def log() -> InMemoryLog:
    return open_log()


def train_to_the_end(trainer: Trainer) -> None:
    while trainer.stream.poll(0) or trainer.stream.assembler.ready:
        while trainer.stream.assembler.ready:
            trainer.step()


def assert_same(one: Trainer, other: Trainer) -> None:
    state, expected = one.learner.state(), other.learner.state()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
    report, wanted = (training_report(t, seconds=1, trained=1) for t in (one, other))
    assert {**report, "lineage": None} == {**wanted, "lineage": None}
    assert conservation_errors(report) == []
    assert one.experts.summary() == other.experts.summary()
    routing, wanted_routing = (
        routing_report(t.experts.history, t.learner.expert_limits, ["click", "like", "watch"]) for t in (one, other)
    )
    assert routing == wanted_routing
    assert len(routing["stretches"]) > 3
    assert routing["stretches"][1]["drift"] is not None
    assert one.experts.routing() == routing_summary(one.experts.history, one.learner.expert_limits)


@pytest.mark.parametrize("seed", range(4))
def test_killed_anywhere_it_goes_on_bit_for_bit(seed: int, log: InMemoryLog, tmp_path: Path) -> None:
    fill(log, 3000)
    never_killed = make_trainer(log, None)
    train_to_the_end(never_killed)
    assert never_killed.learner.step_number > 20

    chance = random.Random(seed)
    lives = 0
    while True:
        lives += 1
        trainer = make_trainer(log, tmp_path)
        resumed = trainer.restore()
        assert (resumed is None) == (lives == 1)
        trainer.checkpoint()
        killed = False
        while not killed and (trainer.stream.poll(0) or trainer.stream.assembler.ready):
            while trainer.stream.assembler.ready and not killed:
                trainer.step()
                if chance.random() < 0.3:
                    trainer.checkpoint()
                killed = chance.random() < 0.08  # everything since the checkpoint is lost
        if not killed:
            break
    assert lives > 1
    assert_same(trainer, never_killed)


def test_batches_sent_ahead_change_nothing(log: InMemoryLog, tmp_path: Path) -> None:
    """The GPU's way of feeding, on the CPU: same weights, also over a restart at every tenth step."""
    fill(log, 3000)
    plain = make_trainer(log, None)
    train_to_the_end(plain)
    ahead = make_trainer(log, tmp_path, prefetch=True)
    while ahead.stream.poll(0) or ahead.stream.assembler.ready:
        while ahead.stream.assembler.ready:
            ahead.step()
            if ahead.learner.step_number % 10 == 0:
                ahead.checkpoint()
                ahead = make_trainer(log, tmp_path, prefetch=True)
                assert ahead.restore()
    assert_same(ahead, plain)


def test_a_clean_stop_loses_nothing(log: InMemoryLog, tmp_path: Path) -> None:
    fill(log, 2500)
    never_stopped = make_trainer(log, None)
    train_to_the_end(never_stopped)

    first = make_trainer(log, tmp_path)
    steps = iter(range(7))
    first.run(should_stop=lambda: next(steps, None) is None)
    assert first.learner.step_number < never_stopped.learner.step_number
    second = make_trainer(log, tmp_path)
    assert second.restore() == first.learner.step_number
    assert second.lineage == first.lineage
    train_to_the_end(second)
    assert_same(second, never_stopped)


def test_learns_and_routes(log: InMemoryLog) -> None:
    fill(log, 6000)
    trainer = make_trainer(log, None)
    train_to_the_end(trainer)
    trainer.settle()
    click = trainer.evaluation.report()["click"]
    assert click.auc is not None
    assert click.auc > 0.6
    assert trainer.experts.instances == trainer.trained
    bound = MODEL.smes.num_shared + 3 * MODEL.smes.num_adaptive
    assert trainer.experts.max is not None
    assert MODEL.smes.num_shared + MODEL.smes.num_adaptive <= trainer.experts.max <= bound


def test_a_damaged_checkpoint_yields_to_the_one_before(log: InMemoryLog, tmp_path: Path) -> None:
    fill(log, 2500)
    trainer = make_trainer(log, tmp_path)
    trainer.stream.poll(0)
    trainer.checkpoint()
    train_to_the_end(trainer)
    trainer.checkpoint()
    newest = tmp_path / f"step-{trainer.learner.step_number:012d}.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert make_trainer(log, tmp_path).restore() == 0
    for path in tmp_path.iterdir():
        path.write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="none can be read"):
        make_trainer(log, tmp_path).restore()


def test_another_schema_or_model_is_refused(log: InMemoryLog, tmp_path: Path) -> None:
    trainer = make_trainer(log, tmp_path)
    trainer.checkpoint()
    directory, schema_hash = CheckpointDirectory(tmp_path, 2), trainer.learner.schema.hash
    with pytest.raises(SchemaMismatch, match=f"{schema_hash} differs from the configured schema's feedfacecafe"):
        directory.newest(schema_hash="feedfacecafe", model=MODEL.to_dict())
    with pytest.raises(CheckpointError, match=r"differs in: embedding_dim"):
        directory.newest(schema_hash=schema_hash, model={**MODEL.to_dict(), "embedding_dim": 4})


def test_a_disk_that_refuses_is_named_and_the_old_checkpoint_stands(
    log: InMemoryLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(log, tmp_path)
    trainer.checkpoint()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="not written: No space left on device"):
        trainer.checkpoint()
    monkeypatch.undo()
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    assert make_trainer(log, tmp_path).restore() == 0


def test_metrics_are_those_of_scores_before_each_step(log: InMemoryLog) -> None:
    """AUC of what the weights said before training, recomputed outside, by scikit-learn."""
    from sklearn.metrics import roc_auc_score

    from smes.model.serving import ServingModel

    fill(log, 2500)
    trainer = make_trainer(log, None)
    labels, scores = [], []
    while trainer.stream.poll(0) or trainer.stream.assembler.ready:
        while trainer.stream.assembler.ready:
            examples = trainer.stream.assembler.ready[0]
            # Rows exist (untrained) by the time a batch is scored, as in the step itself.
            trainer.learner.prepare(examples)
            before = ServingModel(trainer.learner.schema, MODEL, trainer.learner.serving_state())
            scores.append(before.score(examples.ids, examples.numerics))
            labels.append(examples.labels)
            trainer.step()
    trainer.settle()
    click = trainer.evaluation.report()["click"]
    expected = roc_auc_score(np.concatenate(labels)[:, 0], np.concatenate(scores)[:, 0])
    assert click.auc == pytest.approx(expected, abs=2e-4)
