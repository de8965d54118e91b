"""A stored checkpoint and a stored snapshot of today's format are read, and equal what the present code trains anew.

Equal bits are expected on the recorded kind of machine only; close values everywhere.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from feature_store.payload import read_payload
from smes.errors import CheckpointError
from smes.model.serving import ServingModel
from smes_scorer.loading import load_table_model
from tests.fixtures.stored import (
    CHECKPOINT,
    EARLIER_CHECKPOINTS,
    FOLDER,
    MODEL,
    SCHEMA,
    SNAPSHOT,
    STEPS,
    on_the_recorded_machine,
    stored_log,
    stored_trainer,
    train_steps,
    unpack_checkpoint,
)
from tests.trainer.small_world import events
from trainer.checkpoint_file import FORMAT
from trainer.loop import Trainer


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def trained_anew() -> Trainer:
    trainer = stored_trainer(stored_log(), None)
    train_steps(trainer, STEPS)
    return trainer


@pytest.fixture
def restored(tmp_path: Path) -> Trainer:
    unpack_checkpoint(CHECKPOINT, tmp_path)
    trainer = stored_trainer(stored_log(), tmp_path)
    assert trainer.restore() == STEPS
    return trainer


def assert_equal_here(got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Close everywhere; equal bit for bit on the recorded kind of machine."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-5, equal_nan=True, msg=name)
        if on_the_recorded_machine():
            assert torch.equal(got[name], tensor), name


def test_the_checkpoint_holds_the_weights_of_training_anew(restored: Trainer, trained_anew: Trainer) -> None:
    assert_equal_here(restored.learner.state(), trained_anew.learner.state())


def test_the_checkpoint_goes_on_as_training_anew_does(restored: Trainer, trained_anew: Trainer) -> None:
    for trainer in (restored, trained_anew):
        train_steps(trainer, 3)
        while trainer.stream.poll(0):  # how far each has read ahead by now is no matter
            pass

    assert restored.stream.ledger() == trained_anew.stream.ledger()
    assert_equal_here(restored.learner.state(), trained_anew.learner.state())


def test_the_snapshot_scores_as_training_anew_does(trained_anew: Trainer) -> None:
    impressions, _ = events(100, seed=3)
    expected = ServingModel.from_state(SCHEMA, MODEL, trained_anew.learner.serving_state())

    payload = (FOLDER / SNAPSHOT).read_bytes()
    served = load_table_model([read_payload([payload], len(payload))], SCHEMA)

    scores = served.score(impressions.ids, impressions.numerics)
    np.testing.assert_allclose(scores, expected.score(impressions.ids, impressions.numerics), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("number", EARLIER_CHECKPOINTS)
def test_a_stored_checkpoint_of_an_earlier_format_is_refused_by_its_number(tmp_path: Path, number: int) -> None:
    unpack_checkpoint(EARLIER_CHECKPOINTS[number], tmp_path)

    with pytest.raises(CheckpointError, match=rf"checkpoint .*\.safetensors: format {number}, expected {FORMAT}"):
        stored_trainer(stored_log(), tmp_path).restore()
