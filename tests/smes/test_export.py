"""The exported dense part gives the model's scores, and a program that does not is refused.

Every form of SMES is compared as the export runs it, with every expert for every instance. One model goes all the way
through ``torch.export`` here, and a linear one in ``tests/integration/test_frozen_version.py``.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from smes.events import ExampleBlock
from smes.model.config import ModelConfig, OptimizerConfig, RankerName
from smes.model.export import BATCHES, arguments, check_exported, export_dense, random_inputs
from smes.model.learner import Learner
from smes.model.serving import ServingModel
from smes.rankers.sparse.packing import combine, dispatch, dispatch_all
from tests.smes.plain_smes import plain
from tests.smes.streams import history_stream
from tests.smes.test_smes_forms import FORMS, _ranker, _x


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_running_every_expert_gives_what_running_the_chosen_ones_gives(form: Mapping[str, Any]) -> None:
    ranker, x_BI = _ranker(form).eval(), _x()
    with torch.no_grad():
        h_BD = ranker.encoder(x_BI)
        routing = ranker.route(x_BI, h_BD)
        padded_BD = torch.nn.functional.pad(h_BD, (0, ranker._padding))
        every, chosen = (
            combine(ranker.experts(padded_BD, plan), routing.weights_BRK, plan)
            for plan in (dispatch_all(routing), dispatch(routing, trim=True))
        )
    torch.testing.assert_close(every, chosen, rtol=1e-5, atol=1e-6)


def trained(ranker: RankerName) -> tuple[ServingModel, dict[str, torch.Tensor], ExampleBlock]:
    """A model after a few steps on users' histories, its table, and the last batch."""
    schema, batches = history_stream(batches=4, size=64)
    shape = {"experts.num": 6, "encoder_dims": (16,), "experts.dims": (8,), "num_group": 2}
    config = ModelConfig(ranker=ranker, embedding_dim=8, smes=plain(shape))
    learner = Learner(schema, config, OptimizerConfig(), device=torch.device("cpu"), seed=0)
    for batch in batches:
        learner.step(learner.prepare(batch))
    state = learner.serving_state()
    table = {name: state[f"table.{name}"] for name in ("embedding", "wide") if f"table.{name}" in state}
    return ServingModel.from_state(schema, config, state), table, batches[-1]


def test_an_exported_dense_part_scores_events_as_the_model_does() -> None:
    model, table, batch = trained("smes")
    program = export_dense(model, table)

    for instances in (1, 5, len(batch)):
        ids, numerics = batch.ids[:instances], batch.numerics[:instances]
        with torch.no_grad():
            got = program.module()(*arguments(model.inputs(ids, numerics))).numpy()
        np.testing.assert_allclose(got, model.score(ids, numerics), rtol=1e-4, atol=1e-5)
    rng = np.random.default_rng(1)
    random = random_inputs(model, table, BATCHES[-1], rng)
    check_exported(program, model, random)
    other, _, _ = trained("linear")
    with pytest.raises(ValueError, match="off by up to"):
        check_exported(program, other, random)
