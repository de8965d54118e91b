"""The model around a ranker: feature layer, linear part, ranker, task heads, losses, base rates.

Letters: B instances, T tasks, H width of a task's representation.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smes.arrays import under
from smes.derive import UNKNOWN, count_boundaries
from smes.model.before import before_of
from smes.model.borrowing import LabelRegression
from smes.model.config import ModelConfig, RankerName, RareTasksConfig
from smes.model.delayed_feedback import DelayedWeights
from smes.model.features import FeatureInputs, FeatureLayer, RequestInputs
from smes.rankers.config import task_groups
from smes.rankers.home import HoME
from smes.rankers.linear import LinearRanker
from smes.rankers.mmoe import MMoE
from smes.rankers.ple import PLE
from smes.rankers.ranker import Ranker, RankerOutput, RoutedRanker, RunningMoments
from smes.rankers.ranker_input import RankerInput, whole
from smes.rankers.shared_bottom import SharedBottom
from smes.rankers.sparse.ranker import SMES, declared_structure
from smes.rankers.structure import Structure, structure_of
from smes.schema import Schema


class TaskOutputs(nn.Module):
    """From logits to scores and to the loss, by kind of task; and the base rate of every task.

    - Binary task: the score is the probability ``sigmoid(logit)``; the loss is binary cross-entropy.
    - Regression task: the score is ``expm1(logit)``, clipped to 0 … ``max_value``; the loss is the Huber loss (δ = 1)
      of the logit against ``log1p(label)``. Watch times differ by orders of magnitude, and a few long ones must not
      dominate the gradient.

    The base rate is the running mean label, as a logit. The model adds it to every logit of the task. It is counted and
    not learned: otherwise a task with one positive in a thousand would spend its first thousand steps on learning it.

    Args:
        schema: Its tasks.
        rare: How tasks with few positives learn; None for the default.
    """

    is_binary_T: Tensor
    loss_weight_T: Tensor
    max_logit_T: Tensor

    def __init__(self, schema: Schema, rare: RareTasksConfig | None = None) -> None:
        super().__init__()
        tasks = schema.tasks
        self.register_buffer("is_binary_T", torch.tensor([t.kind == "binary" for t in tasks]), persistent=False)
        self.register_buffer("loss_weight_T", torch.tensor([t.loss_weight for t in tasks]), persistent=False)
        max_logit = [math.log1p(t.max_value) for t in tasks]
        self.register_buffer("max_logit_T", torch.tensor(max_logit), persistent=False)
        self.labels = RunningMoments(len(tasks))
        self.rare = rare = rare or RareTasksConfig()
        self.borrowing = LabelRegression(len(tasks), rare.borrow_ratio) if rare.borrow_ratio else None

    def base_logits(self) -> Tensor:
        """Base rate of every task as a logit; 0 for a task without any label so far. float32 [T]."""
        seen_T = self.labels.count_C
        # Half a positive and half a negative are added. Otherwise a rare task's first batch would give an infinity.
        rate_T = (self.labels.mean_C * seen_T + 0.5) / (seen_T + 1.0)
        return torch.where(self.is_binary_T, torch.logit(rate_T, eps=1e-9), self.labels.mean_C).float()

    def logits(self, own_BT: Tensor) -> Tensor:
        """Add base rates, and what tasks borrow from denser ones, to the tasks' own logits. float32 [B, T]."""
        base_T = self.base_logits()
        logits_BT = own_BT + base_T
        if self.borrowing is None:
            return logits_BT
        borrowed_BT: Tensor = self.borrowing(logits_BT.sigmoid(), base_T.sigmoid())
        return logits_BT + borrowed_BT

    def gradient_factors(self) -> Tensor:
        """``(0.25 / (p (1 - p)))^α`` of each binary task, limited; 1 for regression. float32 [T]."""
        seen_T = self.labels.count_C
        rate_T = (self.labels.mean_C * seen_T + 1.0) / (seen_T + 4.0)  # one positive and three negatives are added
        factor_T = (0.25 / (rate_T * (1 - rate_T)).clamp(min=1e-9)).pow(self.rare.gradient_power)
        return torch.where(self.is_binary_T, factor_T.clamp(max=self.rare.gradient_limit), 1.0).float()

    def trust(self) -> Tensor:
        """``(n + 1) / (n + 1 + c)``, n the labels of a task's rarer kind so far; 1 for regression. float32 [T]."""
        rarer_T = self.labels.count_C * torch.minimum(self.labels.mean_C, 1 - self.labels.mean_C) + 1.0
        return torch.where(self.is_binary_T, rarer_T / (rarer_T + self.rare.linear_prior), 1.0).float()

    def scores(self, logits_BT: Tensor) -> Tensor:
        """Probabilities of binary tasks, values in the label's unit of regression tasks. [B, T] → float32 [B, T]."""
        values_BT = torch.minimum(logits_BT.clamp(min=0.0), self.max_logit_T).expm1()
        return torch.where(self.is_binary_T, logits_BT.sigmoid(), values_BT)

    def loss(
        self,
        logits_BT: Tensor,
        labels_BT: Tensor,
        mask_BT: Tensor,
        weight_B: Tensor,
        delayed: DelayedWeights | None = None,
    ) -> Tensor:
        """The loss over all tasks, a scalar: ``Σ_t λ_t Σ_b w_b m_bt l_bt / Σ_b w_b``.

        λ are the tasks' loss weights, w the sample weights and m the mask. The divisor does not depend on the mask, so
        every label counts the same, however many labels the batch has. A task without labels adds 0.

        Args:
            logits_BT: float32, base rates included.
            labels_BT: float32, any value where masked.
            mask_BT: bool, true where there is a label.
            weight_B: Sample weights ≥ 0.
            delayed: Weights of the labels where some feedback is still to come; they multiply m.
        """
        sum_T = self.losses(logits_BT, labels_BT, mask_BT, weight_B, delayed).sum(dim=0)
        return torch.dot(sum_T, self.loss_weight_T) / weight_B.sum().clamp(min=1e-12)

    def losses(
        self,
        logits_BT: Tensor,
        labels_BT: Tensor,
        mask_BT: Tensor,
        weight_B: Tensor,
        delayed: DelayedWeights | None = None,
    ) -> Tensor:
        """``w_b m_bt l_bt`` of :meth:`loss`. float32 [B, T], or [K, B, T] for K times as many logits."""
        target_BT = self._targets(labels_BT, mask_BT).expand_as(logits_BT)
        cross_entropy_BT = F.binary_cross_entropy_with_logits(logits_BT, target_BT, reduction="none")
        huber_BT = F.huber_loss(logits_BT, target_BT, reduction="none")
        return torch.where(self.is_binary_T, cross_entropy_BT, huber_BT) * _cell_weights(mask_BT, weight_B, delayed)

    def residuals(
        self,
        logits_BT: Tensor,
        labels_BT: Tensor,
        mask_BT: Tensor,
        weight_B: Tensor,
        delayed: DelayedWeights | None = None,
    ) -> Tensor:
        """Label minus prediction, times the sample weight; 0 where there is no label. float32 [B, T].

        For a regression task, label and prediction are ``log1p`` of the values.
        """
        target_BT = self._targets(labels_BT, mask_BT)
        predicted_BT = torch.where(self.is_binary_T, logits_BT.sigmoid(), logits_BT)
        return (target_BT - predicted_BT) * _cell_weights(mask_BT, weight_B, delayed)

    def observe(
        self, labels_BT: Tensor, mask_BT: Tensor, weight_B: Tensor, delayed: DelayedWeights | None = None
    ) -> None:
        """Update the base rates with a batch. Call it after the batch was scored.

        With ``delayed`` labels, what tasks borrow stays as it is: it needs all labels of an impression together, which
        :meth:`observe_final` brings.
        """
        target_BT, weight_BT = self._targets(labels_BT, mask_BT), mask_BT * weight_B.unsqueeze(1)
        if delayed is not None:
            weight_BT = torch.where(weight_BT > 0, weight_BT * delayed.mean_BT, 0.0)  # a masked one may not be finite
        self.labels.observe(target_BT, weight_BT)
        if self.borrowing is not None and delayed is None:
            self.borrowing.observe(target_BT, weight_BT, self.is_binary_T)

    def observe_final(self, labels_BT: Tensor, mask_BT: Tensor, weight_B: Tensor) -> None:
        """Update what tasks borrow with the final labels of impressions that were trained on before they were known."""
        if self.borrowing is not None:
            target_BT, weight_BT = self._targets(labels_BT, mask_BT), mask_BT * weight_B.unsqueeze(1)
            self.borrowing.observe(target_BT, weight_BT, self.is_binary_T)

    def _targets(self, labels_BT: Tensor, mask_BT: Tensor) -> Tensor:
        labels_BT = torch.where(mask_BT, labels_BT, 0.0)
        return torch.where(self.is_binary_T, labels_BT, labels_BT.clamp(min=0.0).log1p())


def _cell_weights(mask_BT: Tensor, weight_B: Tensor, delayed: DelayedWeights | None) -> Tensor:
    weight_BT = mask_BT * weight_B.unsqueeze(1)
    return weight_BT if delayed is None else weight_BT * delayed.loss_BT


class TaskHeads(nn.Module):
    """A small MLP per task, ``logit = SiLU(h_t V_t + c_t) · w_t + b_t``. [B, T, H] → [B, T].

    Args:
        num_tasks: T.
        input_dim: H.
        hidden_dim: Width of the hidden layer; 0 for linear heads.
    """

    def __init__(self, num_tasks: int, input_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Parameter(_uniform(num_tasks, input_dim, hidden_dim)) if hidden_dim else None
        self.hidden_bias = nn.Parameter(torch.zeros(num_tasks, 1, hidden_dim)) if hidden_dim else None
        self.out = nn.Parameter(_uniform(num_tasks, hidden_dim or input_dim, 1).squeeze(2))
        self.out_bias = nn.Parameter(torch.zeros(num_tasks))

    def forward(self, h_BTH: Tensor) -> Tensor:
        if self.hidden is not None and self.hidden_bias is not None:
            h_BTH = F.silu(torch.baddbmm(self.hidden_bias, h_BTH.transpose(0, 1), self.hidden)).transpose(0, 1)
        # Multiply and sum: on the CPU a batch of matrix-vector products is several times slower.
        return (h_BTH.float() * self.out).sum(dim=2) + self.out_bias


def _uniform(num_tasks: int, d_in: int, d_out: int) -> Tensor:
    bound = 1 / math.sqrt(d_in)
    return torch.empty(num_tasks, d_in, d_out).uniform_(-bound, bound)


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
    """

    logits_BT: Tensor
    ranker: RankerOutput
    x: RankerInput

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
            self._scale_gradient(output.tasks_BTH)
            heads_BT = self.heads(output.tasks_BTH) if self.heads is not None else None
        if wide_BT is not None:
            wide_BT = wide_BT * self.tasks.trust()
        first, *others = (part.float() for part in (wide_BT, heads_BT) if part is not None)
        return ModelOutput(self.tasks.logits(sum(others, start=first)), output, x_BI)

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

    def _scale_gradient(self, tasks_BTH: Tensor | None) -> None:
        """Multiply each task's gradient on its way into the ranker. Heads and linear part keep theirs."""
        if not self.tasks.rare.gradient_power or tasks_BTH is None or not tasks_BTH.requires_grad:
            return
        factor_T1 = self.tasks.gradient_factors().unsqueeze(1).to(tasks_BTH.dtype)
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

    Args:
        schema: Features and tasks.
        config: Which ranker, its shape, and the layers around it.
        seed: ≥ 0.
        weights: As for :class:`RankModel`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RankModel(schema, config, weights)
