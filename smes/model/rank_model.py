"""The model around a ranker: feature layer, linear part, ranker, task heads, losses, base rates.

Letters: B instances, T tasks, E experts, K experts that a task chooses.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock

import torch
from torch import Tensor, nn

from smes.arrays import under
from smes.derive import UNKNOWN, count_boundaries
from smes.model.before import before_of
from smes.model.config import ModelConfig, RankerName
from smes.model.features import FeatureInputs, FeatureLayer, RequestInputs
from smes.model.task_heads import TaskHeads
from smes.model.task_outputs import TaskOutputs, TaskRates
from smes.rankers.config import task_groups
from smes.rankers.home import HoME
from smes.rankers.linear import LinearRanker
from smes.rankers.mmoe import MMoE
from smes.rankers.ple import PLE
from smes.rankers.ranker import Ranker, RankerOutput, RoutedRanker
from smes.rankers.ranker_input import RankerInput, whole
from smes.rankers.shared_bottom import SharedBottom
from smes.rankers.sparse.ranker import SMES, declared_structure
from smes.rankers.streams import SharedStreams
from smes.rankers.structure import Structure, structure_of
from smes.schema import Schema

_SEEDING = Lock()  # one global random state for all threads

RANKERS: dict[RankerName, Callable[[int, Schema, ModelConfig], Ranker]] = {
    "home": lambda i, s, c: _home(i, s, c, ranker_structure(s, c)),
    "linear": lambda i, s, c: LinearRanker(),
    "mmoe": lambda i, s, c: MMoE(i, s.num_tasks, c.mmoe),
    "ple": lambda i, s, c: PLE(i, s.num_tasks, c.ple),
    "shared_bottom": lambda i, s, c: SharedBottom(i, s.num_tasks, c.shared_bottom),
    "smes": lambda i, s, c: SMES(i, s.num_tasks, c.smes, structure=ranker_structure(s, c)),
}
"""Ranker name → (input width, schema, configuration) → a module that is a :class:`smes.rankers.ranker.Ranker`."""


def ranker_structure(schema: Schema, config: ModelConfig) -> Structure:
    """The routers or groups that a configuration gives the tasks, before any change of the schema.

    Raises:
        ValueError: The configuration names a task that the schema does not have, or does not fit the number of tasks.
    """
    if config.ranker == "smes":
        group_T = task_groups("GroupsConfig.declared", schema, config.smes.groups.declared)
        return declared_structure(schema.num_tasks, config.smes, group_T)
    group_T = (0,) * schema.num_tasks
    if config.ranker == "home":
        group_T = task_groups("HomeConfig.groups", schema, config.home.groups)
    groups = max(group_T) + 1
    return Structure(group_T, tuple(range(groups)), (1 / groups,) * groups, (0,) * schema.num_tasks)


def _home(input_dim: int, schema: Schema, config: ModelConfig, structure: Structure) -> HoME:
    return HoME(input_dim, structure.router_T, config.home, len(structure.group_R))


def _ranker(input_dim: int, schema: Schema, config: ModelConfig, structure: Structure | None) -> Ranker:
    if structure is None or config.ranker not in ("smes", "home"):
        return RANKERS[config.ranker](input_dim, schema, config)
    if config.ranker == "home":
        return _home(input_dim, schema, config, structure)
    return SMES(input_dim, schema.num_tasks, config.smes, structure=structure)


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """Result of one forward pass.

    Attributes:
        logits_BT: float32, with the tasks' base rates.
        ranker: The ranker's output.
        x: The ranker's input.
        task_gradients: From the loss's gradient by ``logits_BT`` to that by ``ranker.tasks_BTH``, on its way into the
            ranker; None where ``ranker.tasks_BTH`` is part of the computation, and can keep its own.
    """

    logits_BT: Tensor
    ranker: RankerOutput
    x: RankerInput
    task_gradients: Callable[[Tensor], Tensor] | None = None

    @property
    def x_BI(self) -> Tensor:
        """The ranker's input as a matrix."""
        return whole(self.x)


class RankModel(nn.Module):
    """The dense part of the model: all weights but the rows of the id table.

    It says of its id table how many rows those ids share that have none of their own (:class:`smes.model.ids.IdKeys`),
    and of derived features where quantile buckets end (:class:`smes.quantiles.StreamQuantiles`). It computes with
    neither.

    Args:
        schema: Features and tasks.
        config: Which ranker, its shape, and the layers around it.
        weights: The weights that will be loaded, if there are any: they tell what changes of the schema have left
            (``structure.*``, ``before.*``). None: the model is as the configuration says.

    Attributes:
        structure: The routers or groups of the tasks, where they are others than the configuration's.
        before: The model of the schema before, right after a change.
    """

    shared_rows_V: Tensor
    boundaries_Q: Tensor

    def __init__(self, schema: Schema, config: ModelConfig, weights: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        vocabularies = {f.vocabulary_name for f in schema.inputs.id_features}
        self.register_buffer("shared_rows_V", torch.zeros(len(vocabularies), dtype=torch.int64))
        if num_boundaries := count_boundaries(schema):
            self.register_buffer("boundaries_Q", torch.full((num_boundaries,), float(UNKNOWN)))
        self.features = FeatureLayer(schema, config.table_dim, wide=config.wide)
        structure = structure_of(under("structure.", weights or {}), schema.num_tasks)
        self.structure = None if structure is None else _Stored(structure.tensors())
        self.ranker = _ranker(self.features.output_dim, schema, config, structure)
        width = self.ranker.output_dim
        self.heads = TaskHeads(schema.num_tasks, width, config.head_dim) if width else None
        self.tasks = TaskOutputs(schema, config.rare)
        self.before = before_of(under("before.", weights or {}), schema)

    def forward(
        self, inputs: FeatureInputs | RequestInputs, autocast: AbstractContextManager[object] | None = None
    ) -> ModelOutput:
        """Logits of B ≥ 1 instances. ``autocast`` sets the precision of the ranker and the heads only."""
        x_BI, wide_BT = self.features(inputs)
        with autocast or nullcontext():
            output = self.ranker(x_BI)
        rates, shared = self.tasks.rates(), output.representations
        if isinstance(shared, SharedStreams) and self.heads is not None and self.heads.read_at_once(shared):
            logits_BT = self.heads.of_streams(shared, wide_BT, rates)
            logits_BT = self.tasks.with_borrowed(logits_BT, rates.base_T)
            return ModelOutput(logits_BT, output, x_BI, partial(self.heads.gradient, factor_T=rates.factor_T))
        with autocast or nullcontext():
            output = replace(output, representations=output.tasks_BTH)
            self._scale_gradient(output.tasks_BTH, rates)
            heads_BT = self.heads(output.tasks_BTH) if self.heads is not None else None
        if wide_BT is not None:
            wide_BT = wide_BT * rates.trust_T
        first, *others = (part.float() for part in (wide_BT, heads_BT) if part is not None)
        logits_BT = sum(others, start=first) + rates.base_T
        return ModelOutput(self.tasks.with_borrowed(logits_BT, rates.base_T), output, x_BI)

    def scores(
        self,
        output: ModelOutput,
        inputs: FeatureInputs | RequestInputs,
        autocast: AbstractContextManager[object] | None = None,
    ) -> Tensor:
        """The scores of a forward pass; right after a change of the schema those of the model before. [B, T]."""
        scores_BT = self.tasks.scores(output.logits_BT.detach())
        if self.before is None:
            return scores_BT
        assert isinstance(inputs, FeatureInputs), "the model before reads whole instances"
        return self.before.put_scores(scores_BT, inputs, autocast)

    def _scale_gradient(self, tasks_BTH: Tensor | None, rates: TaskRates) -> None:
        """Multiply each task's gradient on its way into the ranker. Heads and linear part keep theirs."""
        if not self.tasks.rare.gradient_power or tasks_BTH is None or not tasks_BTH.requires_grad:
            return
        factor_T1 = rates.factor_T.unsqueeze(1).to(tasks_BTH.dtype)
        tasks_BTH.register_hook(factor_T1.mul)  # type: ignore[no-untyped-call]  # torch ships no type for it

    def choices(self, inputs: FeatureInputs, autocast: AbstractContextManager[object] | None = None) -> Tensor | None:
        """The experts that each task chooses for B ≥ 1 instances. Changes nothing.

        Returns:
            int64 [B, T, K]; None for a ranker without experts.
        """
        if not isinstance(self.ranker, RoutedRanker):
            return None
        training = self.training
        self.eval()  # no part observes its input
        x_BI, _ = self.features(inputs)
        with autocast or nullcontext():
            choices_BTK = self.ranker.choices(x_BI)
        self.train(training)
        return choices_BTK

    def expert_weights(self, inputs: FeatureInputs) -> Tensor | None:
        """How much each expert counts for each task in the scores of B ≥ 1 instances. The model must be in evaluation.

        Returns:
            float32 [B, T, E], see :meth:`smes.rankers.ranker.RoutedRanker.expert_weights`; None for a ranker without
            experts.
        """
        assert not self.training, "in training a part would observe its input"
        if not isinstance(self.ranker, RoutedRanker):
            return None
        x_BI, _ = self.features(inputs)
        weights_BTE = self.ranker.expert_weights(x_BI)
        return weights_BTE if self.before is None else self.before.put_expert_weights(weights_BTE, inputs)


class _Stored(nn.Module):
    """Tensors that are part of the weights."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def form_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those weights that tell which form a model has beside its configuration: what changes of the schema have left."""
    return {name: tensor for name, tensor in weights.items() if name.startswith(("structure.", "before."))}


def build_model(
    schema: Schema, config: ModelConfig, seed: int, weights: Mapping[str, Tensor] | None = None
) -> RankModel:
    """Build a model whose first weights depend on ``seed`` alone. Torch's global random state does not change.

    Several threads may build at the same time.

    Args:
        schema: Features and tasks.
        config: Which ranker, its shape, and the layers around it.
        seed: ≥ 0.
        weights: As for :class:`RankModel`.
    """
    with _SEEDING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RankModel(schema, config, weights)
