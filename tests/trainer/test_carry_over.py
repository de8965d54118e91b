"""A trainer that goes on from a checkpoint of another schema: the same lineage, with what was learned and joined."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from smes.arrays import under
from smes.errors import CheckpointError, SchemaMismatch
from smes.events import DROPPED, FeedbackBlock, ImpressionBlock
from smes.model.config import OptimizerConfig
from smes.model.frozen_model import FrozenModel, KeptModel
from smes.model.learner import Learner
from smes.model.rows_config import RowsConfig
from smes.model.serving import ServingModel
from smes.schema import Feature, Schema, Task
from smes.schema_change import Renames, SchemaChange
from stream.audit import audit
from stream.codec.codec import encode_feedback, encode_impressions
from stream.dead_letters import DeadLetterWriter
from stream.example_stream import ExampleStream
from stream.log.memory_log import InMemoryLog
from stream.topics import FEEDBACK, IMPRESSIONS
from tests.fixtures.stored import digest
from tests.trainer.small_world import MODEL, SCHEMA, STREAM, events, make_trainer, open_log, train_to_the_end
from trainer.carry_over import CarryOver
from trainer.checkpoints import CheckpointDirectory
from trainer.config import EvaluationConfig, GateConfig
from trainer.evaluation import ProgressiveEvaluation
from trainer.gate import PublishGate
from trainer.gated_cuts import GatedCuts
from trainer.loop import Trainer
from trainer.report import conservation_errors
from trainer.run_report import training_report
from trainer.schedule import Flags

NOW = Schema(
    name="small",
    features=(
        Feature("cost", kind="numeric"),
        Feature("colour"),
        Feature("tags", kind="bag", max_length=5),
        Feature("tab"),
    ),
    tasks=(Task("share", window_s=10), Task("watch", kind="regression", window_s=8), Task("clicked", window_s=5)),
)
CHANGE = SchemaChange(SCHEMA, NOW, Renames(features={"cost": "price"}, tasks={"clicked": "click"}))
HOW = CarryOver(CHANGE, MODEL, OptimizerConfig(), RowsConfig(), seed=1, join=STREAM.join, gate=False)


def append(log: InMemoryLog, impressions: ImpressionBlock, feedback: FeedbackBlock, schema: Schema) -> None:
    log.append(IMPRESSIONS, encode_impressions(impressions, schema, "arrow", 2))
    log.append(FEEDBACK, encode_feedback(feedback, schema, "json", 2))


def as_now(n: int, first: int) -> tuple[ImpressionBlock, FeedbackBlock]:
    """Events as the service of the new schema makes them: the colour tells whether a user shares."""
    shown, feedback = events(n, seed=2, first=first)
    rng = np.random.default_rng(3)
    impressions, outcomes = CHANGE.impressions(shown), CHANGE.feedback(feedback)
    impressions.no_label[:] = 0
    impressions.ids[:, NOW.id_slices["colour"].start] = rng.integers(0, 4, n)
    shares = FeedbackBlock.empty(n)
    shares.impression_id[:] = impressions.impression_id
    shares.event_time_ms[:] = impressions.event_time_ms + 100
    shares.task[:] = NOW.task_index["share"]
    shares.value[:] = impressions.ids[:, NOW.id_slices["colour"].start] == 1
    both = FeedbackBlock.concat([outcomes.take(outcomes.task != DROPPED), shares])
    return impressions, both.take(np.argsort(both.event_time_ms, kind="stable"))


def trainer_of_now(log: InMemoryLog, folder: Path, gated: GatedCuts | None = None) -> Trainer:
    learner, letters = Learner(NOW, MODEL, OptimizerConfig(), device=torch.device("cpu"), seed=1), DeadLetterWriter(log)
    return Trainer(
        learner,
        ExampleStream(NOW, STREAM, log, letters, changes=[CHANGE]),
        ProgressiveEvaluation(
            NOW,
            EvaluationConfig(window_s=10),
            freeze=lambda: FrozenModel.freeze(learner),
            thaw=lambda state: FrozenModel.thaw(learner, state),
        ),
        Flags(),
        checkpoints=CheckpointDirectory(folder, keep=3),
        dead_letters=letters.write,
        gated=gated,
    )


def state_of(trainer: Trainer) -> dict[str, np.ndarray]:
    return {name: array.read() for name, array in trainer.view().arrays.items()}


@pytest.fixture
def log() -> InMemoryLog:
    """2,000 impressions of the schema before, and their feedback."""
    log = open_log()
    append(log, *events(2000), SCHEMA)
    return log


def begun(log: InMemoryLog, folder: Path, steps: int = 8) -> Trainer:
    """A trainer of the schema before that has stopped in the middle, with impressions and feedback that wait."""
    trainer = make_trainer(log, folder)
    while trainer.learner.step_number < steps:
        if not trainer.step():
            assert trainer.stream.poll(0), "the log has enough events"
    trainer.checkpoint()
    return trainer


def test_the_training_goes_on_with_what_it_has_learned_and_read(log: InMemoryLog, tmp_path: Path) -> None:
    before = begun(log, tmp_path)
    shown, _ = events(300, seed=9)
    now_shown = CHANGE.impressions(shown)
    was_served = ServingModel.from_state(SCHEMA, MODEL, before.learner.serving_state())
    scores = was_served.score(shown.ids, shown.numerics, shown.event_time_ms)

    after = trainer_of_now(log, tmp_path)
    step = after.restore(HOW)

    assert (step, after.learner.step_number, after.lineage) == (9, 9, before.lineage)
    served = ServingModel.from_state(NOW, MODEL, after.learner.serving_state())
    now_scores = served.score(now_shown.ids, now_shown.numerics, now_shown.event_time_ms)
    assert np.array_equal(now_scores[:, [2, 1]], scores[:, [0, 2]])  # to the bit
    assert after.stream.positions_by_topic() == before.stream.positions_by_topic()
    was, now = before.stream.ledger(), after.stream.ledger()
    assert (now.impressions, now.feedback, now.waiting) == (was.impressions, was.feedback, was.waiting)
    assert was.waiting > 0
    metrics, then = after.evaluation.report(), before.evaluation.report()
    assert metrics["clicked"].auc == then["click"].auc
    assert metrics["watch"].mae == then["watch"].mae
    assert (metrics["share"].examples, after.trained) == (0, before.trained)
    assert after.schemas.hashes == (SCHEMA.hash,)

    append(log, *as_now(1500, first=2000), NOW)
    append(log, *events(300, seed=5, first=3500), SCHEMA)  # a producer that has not changed yet
    append(log, *as_now(600, first=3800), NOW)
    train_to_the_end(after)
    after.stream.flush()
    train_to_the_end(after)

    report = training_report(after, seconds=1, trained=1).to_dict()
    assert conservation_errors(report) == []
    assert report["events"]["trained"] == 4400
    assert report["feedback"]["dropped"] > 0
    found = after.evaluation.report()["share"]
    assert found.examples == 2100  # not of impressions that knew nothing of it
    assert found.auc is not None
    assert found.auc > 0.8
    result = audit(
        log,
        NOW,
        under("stream.", state_of(after)),
        trained=after.trained,
        not_finite=0,
        old_schemas=after.schemas.known(),
    )
    assert result.imbalances == []


def test_it_goes_on_bit_for_bit_after_a_kill_wherever_that_is(log: InMemoryLog, tmp_path: Path) -> None:
    """Before the new checkpoint is on disk: from the old one again. Afterwards: from the new one."""
    begun(log, tmp_path)
    append(log, *as_now(300, first=2000), NOW)
    always = trainer_of_now(log, tmp_path)
    always.restore(HOW)
    [old, new] = sorted(tmp_path.glob("*.safetensors"))
    kept = new.read_bytes()
    train_to_the_end(always)

    new.unlink()
    again = trainer_of_now(log, tmp_path)
    again.restore(HOW)
    assert new.read_bytes() == kept
    old.unlink()
    restarted = trainer_of_now(log, tmp_path)
    assert restarted.restore() == 9
    train_to_the_end(restarted)

    assert digest(state_of(restarted)) == digest(state_of(always))


def test_without_the_wish_nothing_is_touched(log: InMemoryLog, tmp_path: Path) -> None:
    begun(log, tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}

    with pytest.raises(SchemaMismatch, match=r"new feature 'cost'.*smes train --change-schema goes on from it"):
        trainer_of_now(log, tmp_path).restore()
    kinds = replace(NOW, tasks=(*NOW.tasks[:1], Task("watch", window_s=8), NOW.tasks[2]))
    broken = replace(HOW, change=SchemaChange(SCHEMA, kinds, CHANGE.renamed))
    with pytest.raises(CheckpointError, match=r"cannot be carried over: task 'watch': kind binary, was regression"):
        trainer_of_now(log, tmp_path).restore(broken)

    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_a_gate_that_refuses_keeps_its_say(log: InMemoryLog, tmp_path: Path) -> None:
    """Under another schema nothing would tell it any more why it refused."""
    config = GateConfig(enabled=True)
    learner = make_trainer(log, None).learner
    gate = PublishGate(SCHEMA, config, thaw=lambda state: FrozenModel.thaw(learner, state))
    gated = GatedCuts(gate, reference=lambda: FrozenModel.freeze(learner), keep=lambda: KeptModel.keep(learner))
    trainer = make_trainer(log, tmp_path, learner=learner, gated=gated)
    gate._marks.in_a_row = 2
    trainer.checkpoint()
    checkpoints = CheckpointDirectory(tmp_path, 2)
    checkpoint = checkpoints.newest(schema=NOW, model=MODEL.to_dict(), any_schema=True)
    assert checkpoint is not None

    assert HOW.problems(checkpoint) == []
    [problem] = replace(HOW, gate=True).problems(checkpoint)

    assert "refused the last 2 cuts" in problem
    assert any("publish gate" in line for line in replace(HOW, gate=True).begins_anew(checkpoint))
