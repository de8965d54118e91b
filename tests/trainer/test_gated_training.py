"""A trainer behind the gate, on a poisoned stream, with a real store: what is served, what is kept, what is learned."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import redis
import torch

from feature_store.snapshots import SnapshotStore
from smes.events import FeedbackBlock
from smes.model.frozen_model import FrozenModel, KeptModel
from smes.model.learner import Learner
from stream.codec.codec import encode_feedback, encode_impressions
from stream.log.memory_log import InMemoryLog
from stream.topics import FEEDBACK, IMPRESSIONS
from tests.running import until
from tests.trainer.small_world import MODEL, SCHEMA, events, make_learner, make_trainer, open_log
from trainer.config import GateConfig
from trainer.gate import PublishGate
from trainer.gated_cuts import GatedCuts
from trainer.loop import Trainer
from trainer.publisher import Publisher
from trainer.report import conservation_errors
from trainer.run_report import training_report

NOW_MS = 1_700_000_500_000
IMPRESSIONS_IN_ALL, POISONED = 8000, slice(5000, 6200)
STEPS_A_CUT = 5


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def poisoned_log() -> InMemoryLog:
    """The small world, with the labels of its binary tasks flipped for a while."""
    impressions, feedback = events(IMPRESSIONS_IN_ALL, seed=3)
    inside = (feedback.impression_id >= POISONED.start) & (feedback.impression_id < POISONED.stop) & (feedback.task < 2)
    told = set(zip(feedback.impression_id[inside].tolist(), feedback.task[inside].tolist(), strict=True))
    others = [(i, t) for i in range(POISONED.start, POISONED.stop) for t in (0, 1) if (i, t) not in told]
    false = FeedbackBlock.empty(len(others))
    false.impression_id[:], false.task[:] = np.array(others).T
    false.value[:] = 1
    false.event_time_ms[:] = impressions.event_time_ms[false.impression_id] + 100
    both = FeedbackBlock.concat([feedback.take(~inside), false])
    log = open_log()
    log.append(IMPRESSIONS, encode_impressions(impressions, SCHEMA, "json", 2))
    log.append(FEEDBACK, encode_feedback(both.take(np.argsort(both.event_time_ms, kind="stable")), SCHEMA, "json", 2))
    return log


def gated(learner: Learner, config: GateConfig) -> GatedCuts:
    """The gate of a learner."""
    again = KeptModel.keep_again if config.then == "go_back" else FrozenModel.thaw
    return GatedCuts(
        PublishGate(SCHEMA, config, thaw=lambda state: again(learner, state)),
        reference=lambda: FrozenModel.freeze(learner),
        keep=lambda: KeptModel.keep(learner),
    )


def config(**others: object) -> GateConfig:
    values = {"sample_share": 1.0, "warm_up_examples": 1024, "max_user_share": 0.2, "accept_after_s": None, **others}
    return GateConfig(enabled=True, stretch_examples=2048, **values)  # type: ignore[arg-type]


def trainer_of(log: InMemoryLog, gate: GateConfig, checkpoints: Path | None = None) -> Trainer:
    learner = make_learner()
    return make_trainer(log, checkpoints, learner=learner, gated=gated(learner, gate))


def publish_to(trainer: Trainer, store: SnapshotStore) -> Publisher:
    trainer.publish_to(
        lambda lineage: Publisher(store, SCHEMA, MODEL.to_dict(), lineage, now_ms=lambda: NOW_MS), store.current()
    )
    assert trainer.publisher is not None
    return trainer.publisher


def cuts(trainer: Trainer) -> Iterator[int]:
    """Train to the end of the log; yields the step after each cut, when it is published."""
    step = trainer.learner.step_number
    while trainer.step() or trainer.stream.poll(0) or trainer.stream.upcoming() is not None:
        if trainer.learner.step_number != step and trainer.learner.step_number % STEPS_A_CUT == 0:
            step = trainer.learner.step_number
            trainer.cut()
            yield step


def step_to(trainer: Trainer, step: int) -> None:
    while trainer.learner.step_number < step:
        assert trainer.step() or trainer.stream.poll(0)


def until_published(publisher: Publisher) -> None:
    while publisher.has_waiting:
        pass


FIRST_BAD, LAST_BAD = POISONED.start // 64, POISONED.stop // 64


@pytest.fixture
def store(client: redis.Redis, namespace: str) -> SnapshotStore:
    return SnapshotStore(client, namespace)


def test_what_a_poisoned_stretch_taught_is_held_and_what_is_served_stays(store: SnapshotStore) -> None:
    trainer = trainer_of(poisoned_log(), config(held_interval_s=0.0))
    publisher = publish_to(trainer, store)
    served_while_poisoned = set()
    for step in cuts(trainer):
        until_published(publisher)
        if FIRST_BAD + STEPS_A_CUT < step <= LAST_BAD:
            served = store.current()
            assert served is not None
            served_while_poisoned.add(served.version)
    trainer.finish()
    gate = trainer.gated.gate if trainer.gated else None
    assert gate is not None
    assert gate.summary()["refused"] >= 3
    assert len(served_while_poisoned) == 1
    assert max(served_while_poisoned) <= FIRST_BAD + STEPS_A_CUT
    assert publisher.held >= 3
    held = store.held()
    assert held
    assert all(manifest.held and ("(click)" in manifest.held or "(like)" in manifest.held) for manifest in held)
    report = training_report(trainer, seconds=1, trained=1).to_dict()
    assert conservation_errors(report) == []
    assert report["gate"]["refused"] == gate.summary()["refused"]


def test_going_back_leaves_the_weights_of_before_and_is_told_in_the_manifest(store: SnapshotStore) -> None:
    log = poisoned_log()
    trainer = trainer_of(log, config(then="go_back", max_refusals=2))
    publisher = publish_to(trainer, store)
    steps = []
    for step in cuts(trainer):
        until_published(publisher)
        steps.append(step)
    assert steps == sorted(set(steps)), "steps are counted on"
    trainer.finish()
    served = store.current()
    assert served is not None
    backs = served.metrics["gate"]["went_back"]
    assert backs
    assert backs[0]["to_step"] <= FIRST_BAD < backs[0]["at_step"]
    assert served.metrics["gate"]["left_out"] > 0
    assert conservation_errors(training_report(trainer, seconds=1, trained=1).to_dict()) == []
    assert trainer.trained == trainer.stream.ledger().impressions - trainer.stream.ledger().waiting


def test_going_back_puts_back_every_bit(store: SnapshotStore) -> None:
    """Weights, accumulators, moments and ids are those of the cut, and so are the scores."""
    trainer = trainer_of(poisoned_log(), config(then="go_back"))
    publish_to(trainer, store)
    for step in cuts(trainer):
        if step == 40:
            break
    before = {name: tensor.clone() for name, tensor in trainer.learner.state().items()}
    step_to(trainer, 52)
    assert trainer.gated is not None
    trainer.gated.go_back(trainer.learner.step_number)
    after = trainer.learner.state()
    assert int(after.pop("step_number")) == int(before.pop("step_number")) + 12
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize(("then", "kill_at"), [("go_back", 83), ("go_back", 92), ("hold", 92)])
def test_killed_anywhere_it_goes_on_bit_for_bit(
    then: str, kill_at: int, client: redis.Redis, namespace: str, tmp_path: Path
) -> None:
    """Killed in the poisoned stretch, before and after the weights went back. Cuts are asked for at the same steps."""
    log, gate = poisoned_log(), config(then=then, max_refusals=2)
    never_killed = trainer_of(log, gate)
    publish_to(never_killed, SnapshotStore(client, f"{namespace}-one"))
    for _ in cuts(never_killed):
        pass
    assert never_killed.gated is not None
    assert bool(never_killed.gated.gate.backs) == (then == "go_back")

    killed = trainer_of(log, gate, tmp_path)
    publish_to(killed, SnapshotStore(client, f"{namespace}-two"))
    for step in cuts(killed):
        if step == kill_at // STEPS_A_CUT * STEPS_A_CUT:
            break
    step_to(killed, kill_at)
    killed.checkpoint()
    again = trainer_of(log, gate, tmp_path)
    assert again.restore() == kill_at
    again.offers.publisher = killed.publisher
    for _ in cuts(again):
        pass
    assert again.gated is not None
    assert again.gated.gate.summary() == never_killed.gated.gate.summary()
    state, expected = again.learner.state(), never_killed.learner.state()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def test_a_promoted_cut_tells_the_gate_that_the_stream_is_to_be_believed(store: SnapshotStore) -> None:
    trainer = trainer_of(poisoned_log(), config(held_interval_s=0.0))
    publisher = publish_to(trainer, store)
    for step in cuts(trainer):
        until_published(publisher)
        if step > FIRST_BAD + STEPS_A_CUT:
            break
    assert trainer.gated is not None
    gate = trainer.gated.gate
    assert gate.refuses
    store.operator.promote(by="the test")
    trainer.cut()
    until(lambda: publisher.promoted, "the promotion seen")
    trainer.cut()
    assert trainer.gated.gate.in_a_row == 0
    assert publisher.close()
    served = store.current()
    assert served is not None
    assert served.version == trainer.learner.step_number
    assert served.kind == "delta"
