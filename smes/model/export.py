"""The dense part of a model as a program of ``torch.export``: for runtimes that have torch, and none of this project.

The program reads what :meth:`smes.model.serving.ServingModel.inputs` gives: rows of the id table and numeric features.
An exported SMES runs every expert for every instance, because ``torch.export`` cannot tell from the routing which rows
a grouped product has. Experts that no task chose count with weight 0, so the scores are the same up to rounding.

Letters: B instances, W id columns, D embedding width, T tasks, F numeric features.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from smes.model.features import FeatureInputs
from smes.model.ids import pool_weights
from smes.model.rank_model import RankModel
from smes.model.serving import ServingModel
from smes.schema import MISSING

BATCHES = (1, 3, 64)
"""Numbers of instances with which an exported program is checked."""

RELATIVE, ABSOLUTE = 1e-4, 1e-5
"""How far a score of an exported program may lie from the model's."""


class DenseScores(nn.Module):
    """From the inputs of the dense part to scores.

    Args:
        model: The dense part.
    """

    def __init__(self, model: RankModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, embedding_BWD: Tensor | None, wide_BWT: Tensor | None, pool_BW: Tensor | None, numerics_BF: Tensor
    ) -> Tensor:
        """Scores of B ≥ 1 instances, float32 [B, T]; arguments as of :class:`smes.model.features.FeatureInputs`."""
        inputs = FeatureInputs(embedding_BWD, wide_BWT, pool_BW, numerics_BF)
        return self.model.scores(self.model(inputs), inputs)


def export_dense(model: ServingModel, table: Mapping[str, Tensor], *, seed: int = 0) -> torch.export.ExportedProgram:
    """Export the dense part, and check that it gives the model's scores.

    Args:
        model: Whose dense part.
        table: Some rows of the id table: ``embedding`` float32 [R, D] and ``wide`` float32 [R, T], those that the model
            has; R ≥ 1.
        seed: Of the inputs with which the program is checked.

    Returns:
        The program. Its arguments are those of :meth:`DenseScores.forward`; None where the model has no such input.

    Raises:
        ValueError: The program gives other scores than the model.
        RuntimeError: ``torch.export`` cannot export this model.
    """
    rng = np.random.default_rng(seed)
    dense = DenseScores(model.dense).eval()
    sample = random_inputs(model, table, BATCHES[-1], rng)
    dynamic = tuple(None if tensor is None else {0: torch.export.Dim.AUTO} for tensor in arguments(sample))
    try:
        with torch.no_grad():
            program = torch.export.export(dense, arguments(sample), dynamic_shapes=dynamic)
    except Exception as error:  # torch raises errors of many kinds from there
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise RuntimeError(f"torch.export: {first[0]}") from error
    for instances in BATCHES:
        check_exported(program, model, random_inputs(model, table, instances, rng))
    return program


def check_exported(program: torch.export.ExportedProgram, model: ServingModel, inputs: FeatureInputs) -> None:
    """Check that a program gives the scores of a model.

    Raises:
        ValueError: It does not; the message says by how much.
    """
    with torch.no_grad():
        expected = model.dense.scores(model.dense(inputs), inputs)
        got: Tensor = program.module()(*arguments(inputs))
    if not torch.allclose(got, expected, rtol=RELATIVE, atol=ABSOLUTE):
        worst = float((got - expected).abs().max())
        raise ValueError(
            f"exported dense part: scores of {len(got)} instances off by up to {worst:.3g}, expected equal ones"
        )


def arguments(inputs: FeatureInputs) -> tuple[Tensor | None, ...]:
    """The arguments of an exported program."""
    return inputs.embedding_BWD, inputs.wide_BWT, inputs.pool_BW, inputs.numerics_BF


def random_inputs(
    model: ServingModel, table: Mapping[str, Tensor], instances: int, rng: np.random.Generator
) -> FeatureInputs:
    """Inputs from rows of a table: lists of any length, numbers as the model has seen them, some of them missing."""
    schema = model.schema.inputs
    width, moments = schema.id_width, model.dense.features.moments
    present = rng.random((instances, width)) < 0.7
    pool_NW = pool_weights(model.schema, np.where(present, 1, MISSING).astype(np.int64))
    rows = {name: torch.from_numpy(rng.integers(0, len(column), (instances, width))) for name, column in table.items()}
    read = {name: torch.nn.functional.embedding(rows[name], column) for name, column in table.items()}
    mean_F, deviation_F = moments.mean_C.numpy(), np.sqrt(moments.variance_C.numpy())
    numerics = mean_F + 2 * deviation_F * rng.standard_normal((instances, schema.num_numerics))
    numerics[rng.random(numerics.shape) < 0.2] = np.nan
    return FeatureInputs(
        embedding_BWD=read.get("embedding"),
        wide_BWT=read.get("wide"),
        pool_BW=None if pool_NW is None else torch.from_numpy(pool_NW),
        numerics_BF=torch.from_numpy(numerics.astype(np.float32)),
    )
