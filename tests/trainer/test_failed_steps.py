"""Steps whose loss or gradients are not finite: dead-lettered, counted, and a stop after several in a row."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from smes.errors import StepsNotFinite
from smes.events import ExampleBlock
from smes.model.config import OptimizerConfig
from smes.model.learner import Learner
from stream.log.memory_log import InMemoryLog
from stream.topics import DEAD_LETTERS
from tests.trainer.small_world import MODEL, SCHEMA, fill, make_trainer, open_log, train_to_the_end
from trainer.checkpoints import CheckpointDirectory
from trainer.loop import CHECKPOINT, Trainer
from trainer.report import conservation_errors
from trainer.run_report import training_report
from trainer.schedule import Flags


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def poison(trainer: Trainer, ids: range, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give some examples an infinite weight, after all that checks events: the loss of their batches is no number."""
    next_batch = trainer.stream.next_batch

    def poisoned() -> ExampleBlock | None:
        examples = next_batch()
        if examples is not None:
            examples.weight[np.isin(examples.impression_id, np.array(ids))] = np.inf
        return examples

    monkeypatch.setattr(trainer.stream, "next_batch", poisoned)


@pytest.fixture
def log() -> InMemoryLog:
    log = open_log()
    fill(log, 2500)
    return log


def letters_in(log: InMemoryLog) -> list[dict[str, object]]:
    positions = log.begin(DEAD_LETTERS)
    return [json.loads(r.value) for r in log.read(positions, max_records=10_000, timeout_s=0).records]


def test_a_failed_step_changes_nothing_and_its_examples_are_set_aside(
    log: InMemoryLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(log, None)
    poison(trainer, range(640, 650), monkeypatch)

    train_to_the_end(trainer)

    report = training_report(trainer, seconds=1, trained=1).to_dict()
    events_ = report["events"]
    assert conservation_errors(report) == []
    assert 64 <= events_["not_finite"] <= 128  # one batch, or two where the ten impressions lie across their border
    assert events_["not_finite"] % 64 == 0
    letters = letters_in(log)
    assert len(letters) == events_["not_finite"]
    assert {letter["code"] for letter in letters} == {"not_finite"}
    payloads = [json.loads(base64.b64decode(str(letter["payload"]))) for letter in letters]
    assert {*range(640, 650)} <= {payload["impression_id"] for payload in payloads}
    assert {letter["place"] for letter in letters} == {f"impression {p['impression_id']}" for p in payloads}
    assert all(tensor.isfinite().all() for name, tensor in trainer.learner.state().items() if name.startswith("dense."))
    assert report["tasks"]["click"]["auc"] is not None


def test_several_in_a_row_stop_at_the_last_good_checkpoint(
    log: InMemoryLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = Flags()
    trainer = make_trainer(log, tmp_path, flags=flags)
    poison(trainer, range(640, 1500), monkeypatch)
    while trainer.learner.step_number < 8:
        assert trainer.step() or trainer.stream.poll(0)
    trainer.checkpoint()

    def ask_for_checkpoints() -> bool:
        flags.request(CHECKPOINT)
        return False

    with pytest.raises(StepsNotFinite, match=r"5 steps in a row: not finite .*trainer\.max_failed_steps"):
        trainer.run(ask_for_checkpoints)

    good = trainer.learner.step_number
    found = CheckpointDirectory(tmp_path, keep=2).newest(schema=SCHEMA, model=MODEL.to_dict())
    assert found is not None
    assert 8 <= found.step <= good  # the one of the last good step is not begun while another is being written
    assert found.arrays["trainer.trained"].tolist() == [64 * found.step, 0]  # none of the failed ones is behind it
    report = training_report(trainer, seconds=1, trained=1).to_dict()
    assert conservation_errors(report) == []
    assert report["events"]["trained"] == 64 * good
    assert report["events"]["not_finite"] == len(letters_in(log)) >= 5 * 64


def test_a_restart_counts_on(log: InMemoryLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(log, tmp_path)
    poison(trainer, range(640, 650), monkeypatch)
    train_to_the_end(trainer)
    trainer.checkpoint()

    again = make_trainer(log, tmp_path)
    again.restore()

    assert (again.trained, again.not_finite) == (trainer.trained, trainer.not_finite)
    assert again.not_finite > 0


def test_a_learning_rate_that_is_far_too_large_ends_in_an_error(log: InMemoryLog) -> None:
    learner = Learner(SCHEMA, MODEL, OptimizerConfig(learning_rate=1e30), device=torch.device("cpu"), seed=1)
    trainer = make_trainer(log, None, learner=learner)

    with pytest.raises(StepsNotFinite):
        trainer.run(lambda: True, drain=True)
