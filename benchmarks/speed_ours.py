"""Our side of the speed benchmark: rankers behind the learner, and SMES executed densely.

Letters: B instances, E experts, P packed rows, D encoder width, Q width of the narrow projection, H output width.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.speed_setting import Contender, Data, Setting
from smes.events import ExampleBlock
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.learner import Learner
from smes.model.rank_model import RANKERS
from smes.model.serving import ServingModel
from smes.rankers.ranker import Ranker
from smes.rankers.sparse.experts import FullExperts, LowRankExperts, ResidualExperts
from smes.rankers.sparse.packing import Dispatch
from smes.rankers.sparse.ranker import SMES
from smes.schema import Schema


class DenseExecution(nn.Module):
    """The same experts, every one of them executed on every instance; what the routing asks for is then picked out.

    Args:
        experts: Full, low-rank or residual ones.
    """

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, h_BD: Tensor, plan: Dispatch) -> Tensor:
        y_EBH = all_outputs(self.experts, h_BD)
        expert_P = torch.searchsorted(plan.offsets_E, torch.arange(len(plan.instance_P), dtype=torch.int32), right=True)
        return y_EBH.flatten(0, 1).index_select(0, expert_P * len(h_BD) + plan.instance_P)


def all_outputs(experts: nn.Module, h_BD: Tensor) -> Tensor:
    """The output of every expert for every instance, by dense batched products. [B, D] → [E, B, H].

    Raises:
        TypeError: A form of expert that has no dense execution here.
    """
    if isinstance(experts, FullExperts):
        x_EBD = h_BD.expand(len(experts.weights[0]), *h_BD.shape)
        for weight_E in experts.weights:
            x_EBD = _activated(experts, torch.bmm(x_EBD, weight_E))
        return x_EBD
    if isinstance(experts, LowRankExperts):
        x_EBD = h_BD.expand(len(experts.down), *h_BD.shape)
        difference_EBH = torch.bmm(torch.bmm(x_EBD, experts.down), experts.up)
    elif isinstance(experts, ResidualExperts):
        q_BQ = h_BD @ experts.narrow
        difference_EBH = torch.bmm(q_BQ.expand(len(experts.differences), *q_BQ.shape), experts.differences)
    else:
        raise TypeError(f"experts: {type(experts).__name__}, expected full, low-rank or residual ones")
    return _activated(experts, h_BD @ experts.base + difference_EBH)


def _activated(experts: FullExperts | LowRankExperts | ResidualExperts, y_EBH: Tensor) -> Tensor:
    return F.silu(experts.norm(y_EBH.flatten(0, 1))).view(y_EBH.shape)


@contextmanager
def dense_smes() -> Iterator[None]:
    """Within it, SMES rankers are built with their dense execution."""
    sparse = RANKERS["smes"]

    def build(input_dim: int, schema: Schema, config: ModelConfig) -> Ranker:
        ranker = sparse(input_dim, schema, config)
        assert isinstance(ranker, SMES)
        ranker.experts = DenseExecution(ranker.experts)
        return ranker

    RANKERS["smes"] = build
    try:
        yield
    finally:
        RANKERS["smes"] = sparse


def blocks(setting: Setting, data: Data) -> list[ExampleBlock]:
    """The batches as the join hands them to a trainer."""
    empty = ExampleBlock.empty(setting.schema, setting.batch_size)
    return [replace(empty, ids=batch.ids, labels=batch.labels) for batch in data.batches]


def our_contender(
    name: str, what: str, config: ModelConfig, setting: Setting, data: Data, *, dense: bool = False
) -> Contender:
    """A ranker behind the learner.

    A step is all that a trainer does for a batch: ids looked up and de-duplicated, scores, losses, base rates, both
    optimisers. A scoring call is all that a server does: from raw ids to scores, by a copy of the first weights.

    Args:
        name: Of the contender, in figures.
        what: The contender in words.
        config: The model.
        setting: Sizes of the benchmark.
        data: What is trained and scored.
        dense: Whether a SMES ranker executes all its experts on every instance.
    """
    schema = setting.schema
    with dense_smes() if dense else nullcontext():
        learner = Learner(schema, config, OptimizerConfig(), device=torch.device("cpu"), seed=setting.seed)
        examples = blocks(setting, data)
        for block in examples:
            learner.prepare(block)  # every id has its row before anything is timed, as in the peers
        state = learner.serving_state()
        serving = ServingModel.from_state(schema, config, state)
    numerics = ExampleBlock.empty(schema, len(data.candidates)).numerics
    return Contender(
        name=name,
        what=what,
        train=lambda n: learner.step(learner.prepare(examples[n % len(examples)])),
        score=lambda: serving.score(data.candidates, numerics),
        parameters=sum(t.numel() for key, t in state.items() if key.startswith("dense.")),
    )
