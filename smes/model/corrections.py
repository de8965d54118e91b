"""Which tasks need experts of their own? Corrections of the model's logits tell it from the stream.

Beside the model, three corrections learn, and change nothing of it: a small network for each task, of its own; one of
the same width for each group of tasks, read by all tasks of the group; and a shift and a scale of each task's logit
alone. All start as 0, are scored before each step, and then learn the tasks' losses with the model's learning rate.
Into the shared network each task sends its gradient with the model's factor for it (:class:`RareTasksConfig`).

What the own network gains over shift and scale is what experts of its own could add. What the shared network gains is
what more experts for the whole group could add at the same cost per task. This is our choice; the question, when a
specialist does better than one that serves all, is that of Mieczkowski et al. (arXiv 2503.15703).

A network is ``w · (SiLU(z A) ⊙ (1 + z B))``. Routed experts depend on products of columns, which a plain layer of this
width hardly finds (docs/experiments/own-experts.md).

Letters: B instances, T tasks, I input width, H width of a task's representation, C columns, N networks, W their width,
V twice that, M of all networks, S blocks of steps, K corrections.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smes.arrays import F64, prefixed, under
from smes.joint_batch import JointBatch
from smes.model.config import ModelConfig, OptimizerConfig, RareTasksConfig
from smes.model.devices import RankBatch
from smes.model.fused_adam import FusedAdam
from smes.model.rank_model import ModelOutput
from smes.model.task_outputs import TaskOutputs
from smes.rankers.config import task_groups
from smes.rankers.ranker import Clusters, RunningMoments
from smes.schema import Schema

WIDTH = 16
_CLIP = 8.0  # as in the routers' input
_MOST_BLOCKS = 128


def sharing_groups(schema: Schema, model: ModelConfig) -> tuple[int, ...]:
    """The group that each task shares experts with, numbered from 0: one group where none are declared, or to be found.

    Raises:
        ValueError: The configuration names a task that the schema does not have.
    """
    if model.ranker == "home":
        return task_groups("HomeConfig.groups", schema, model.home.groups)
    groups = model.smes.groups
    if model.ranker == "smes" and groups.pools == "own" and not groups.found:
        return task_groups("GroupsConfig.declared", schema, groups.declared)
    return (0,) * schema.num_tasks


@dataclass(frozen=True, slots=True)
class CorrectionSums:
    """What corrections have seen, in S blocks of equally many steps; the last one may be shorter.

    Attributes:
        group_T: The group of each task.
        positives_ST: Labels above 0.
        loss_SKT: Sum of the loss, weighted by the samples' weights: of the recalibrated logit, with the own network,
            with the shared one.
        gram_STT: Dot products of the tasks' gradients on their representations; zeros for a ranker without them.
    """

    group_T: tuple[int, ...]
    positives_ST: F64
    loss_SKT: F64
    gram_STT: F64


class Corrections:
    """A :class:`smes.model.step_watcher.StepWatcher` that learns beside a learner.

    Args:
        schema: The tasks.
        group_T: The group of each task, numbered from 0 without gaps.
        optimizer: Gives the learning rate.
        rare: Gives the factors of the tasks' gradients; None for the default.
        seed: Of the first weights; torch's global random state does not change.
    """

    def __init__(
        self,
        schema: Schema,
        group_T: tuple[int, ...],
        optimizer: OptimizerConfig,
        rare: RareTasksConfig | None = None,
        seed: int = 0,
    ) -> None:
        self._schema, self._optimizer, self._seed = schema, optimizer, seed
        self._group_T = group_T
        self._tasks = TaskOutputs(schema, replace(rare or RareTasksConfig(), borrow_ratio=0.0))
        self._learning: _Learning | None = None  # from the first batch on, which tells the widths
        self._blocks = _Blocks()

    def state(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of everything that :meth:`load_state` needs."""
        tensors = {"group_T": torch.tensor(self._group_T)} | prefixed("blocks.", self._blocks.state())
        if self._learning is not None:
            tensors |= prefixed("labels.", {n: t.cpu().clone() for n, t in self._tasks.state_dict().items()})
            tensors |= prefixed("learning.", self._learning.state())
        return tensors

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a :meth:`state`, of the same schema.

        Raises:
            KeyError, RuntimeError: A tensor is missing, unknown or of another shape.
        """
        self._group_T = tuple(state["group_T"].tolist())
        self._blocks.load_state(under("blocks.", state))
        self._learning = None
        if "learning.shape" in state:
            self._tasks.load_state_dict(under("labels.", state))
            I, TH, T = state["learning.shape"].tolist()  # noqa: E741
            first = torch.zeros(1, I), torch.zeros(1, T, TH // T)
            self._learning = _Learning(*first, self._group_T, self._optimizer.learning_rate, self._seed)
            self._learning.load_state(under("learning.", state))

    @property
    def sums(self) -> CorrectionSums:
        """What was seen since the groups are what they are."""
        positives, loss, gram = (table.numpy() for table in self._blocks.tables(self._schema.num_tasks))
        return CorrectionSums(self._group_T, positives, loss, gram)

    def regroup(self, groups: Clusters) -> None:
        """Begin anew with other groups."""
        of_task = {task: number for number, group in enumerate(groups) for task in group}
        group_T = tuple(of_task[t] for t in range(self._schema.num_tasks))
        if group_T != self._group_T:
            self._group_T, self._learning, self._blocks = group_T, None, _Blocks()

    def before_backward(self, output: ModelOutput) -> None:
        """Keep the gradient of the tasks' representations."""
        keeps = output.ranker.tasks_BTH if output.task_gradients is None else output.logits_BT
        if keeps is not None:
            keeps.retain_grad()

    def after_backward(self, output: ModelOutput, batch: RankBatch) -> None:
        """Score the batch with each correction, then take a step with all of them."""
        logits_BT, x_BI = output.logits_BT.detach(), output.x_BI.detach()
        B, T = logits_BT.shape
        with torch.no_grad():
            tasks_BTH, gradient_BTH = output.ranker.tasks_BTH, None
        if tasks_BTH is None:
            tasks_BTH = x_BI.new_zeros(B, T, 0)
        elif output.task_gradients is not None and output.logits_BT.grad is not None:
            gradient_BTH = output.task_gradients(output.logits_BT.grad)
        else:
            tasks_BTH, gradient_BTH = tasks_BTH.detach().float(), tasks_BTH.grad
        if gradient_BTH is None:
            gradient_BTH = torch.zeros_like(tasks_BTH)
        if self._learning is None:
            self._learning = _Learning(x_BI, tasks_BTH, self._group_T, self._optimizer.learning_rate, self._seed)
        self._learning.to(x_BI.device)
        self._tasks.to(x_BI.device)
        joint, weight_B = batch.joint, batch.weight_B
        columns_BC = torch.cat([x_BI, tasks_BTH.flatten(1), logits_BT], dim=1)
        corrections_KBT = self._learning.corrections(columns_BC, tasks_BTH.shape, self._tasks.gradient_factors())
        delayed = batch.delayed_weights(logits_BT)  # by the model's predictions: all corrections have the same weights
        losses_KBT = self._tasks.losses(logits_BT + corrections_KBT, batch.labels_BT, batch.mask_BT, weight_B, delayed)
        weighted_KT = losses_KBT.sum(dim=1)
        total = weight_B.sum().clamp(min=1e-12) if joint is None else max(joint.weight, 1e-12)
        (weighted_KT * self._tasks.loss_weight_T).sum().div(total).backward()  # type: ignore[no-untyped-call]  # torch
        positives_T = ((batch.labels_BT > 0) & batch.mask_BT).sum(dim=0)
        gram_TT = torch.einsum("bth,bsh->ts", gradient_BTH.float(), gradient_BTH.float())
        seen = [positives_T, weighted_KT.detach(), gram_TT]
        labels = (batch.labels_BT, batch.mask_BT, weight_B, delayed)
        if joint is None:
            self._learning.step(columns_BC)
            self._tasks.observe(*labels)
        else:
            seen, sums = [value.double() for value in seen], self._tasks.sums(joint, *labels)
            self._learning.step(columns_BC, joint, [*seen, *sums])
            self._tasks.take_in(sums)
        self._blocks.add(*seen)


class _Learning:
    """The three corrections and their optimiser, on standardised columns."""

    def __init__(
        self, x_BI: Tensor, tasks_BTH: Tensor, group_T: tuple[int, ...], learning_rate: float, seed: int
    ) -> None:
        _, T, H = tasks_BTH.shape
        self._shape = [x_BI.shape[1], T * H, T]
        self._moments = RunningMoments(sum(self._shape))
        generator = torch.Generator().manual_seed(seed)
        of_networks = (None, tuple(range(T)), group_T)
        self._corrections = [_Correction(self._shape[0], H, T, n, generator) for n in of_networks]
        self._rate, self._device = learning_rate, torch.device("cpu")
        self._adam = self._new_adam()

    def to(self, device: torch.device) -> None:
        """Move to a device, once."""
        if device != self._device:
            moments = self._adam.state()
            self._device = device
            for module in (self._moments, *self._corrections):
                module.to(device)
            self._adam = self._new_adam()
            self._adam.load_state(moments)

    def state(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of everything that :meth:`load_state` needs."""
        tensors = prefixed("moments.", self._moments.state_dict())
        for k, correction in enumerate(self._corrections):
            tensors |= prefixed(f"{k}.", correction.state_dict())
        tensors |= prefixed("adam.", self._adam.state())
        copies = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
        return copies | {"shape": torch.tensor(self._shape)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a :meth:`state`."""
        self._moments.load_state_dict(under("moments.", state))
        for k, correction in enumerate(self._corrections):
            correction.load_state_dict(under(f"{k}.", state))
        self._adam.load_state(under("adam.", state))

    def _new_adam(self) -> FusedAdam:
        weights = (weight for correction in self._corrections for weight in correction.parameters())
        return FusedAdam({str(number): weight for number, weight in enumerate(weights)}, self._rate)

    def corrections(self, columns_BC: Tensor, shape: torch.Size, factor_T: Tensor) -> Tensor:
        """What each correction adds to the logits; the tasks' representations have this shape. [K, B, T]."""
        self._adam.clear()
        standard_BC = self._moments.standardise(columns_BC, _CLIP, torch.float32)
        x_BI, flat_BC, logits_BT = torch.split(standard_BC, self._shape, dim=1)
        tasks_BTH = flat_BC.view(shape)
        return torch.stack([correct(logits_BT, x_BI, tasks_BTH, factor_T) for correct in self._corrections])

    def step(self, columns_BC: Tensor, joint: JointBatch | None = None, more: Sequence[Tensor] = ()) -> None:
        """When the gradients are there: learn by those of all ranks, and sum ``more`` over these, in place."""
        if joint is None:
            self._moments.observe(columns_BC)
        else:
            flat, moments_3C = self._adam.flat(), self._moments.sums(joint, columns_BC)
            joint.world.sum([flat, moments_3C, *more])
            self._adam.put_flat(flat)
            self._moments.take_in(moments_3C)
        self._adam.step()


class _Correction(nn.Module):
    """A shift and a scale of each task's logit, and what N networks add to it. 0 at first.

    Args:
        input_dim: I.
        rep_dim: H.
        num_tasks: T.
        network_T: The network that each task reads, numbered from 0 without gaps; None for none.
        generator: Of the first weights.
    """

    network_T: Tensor
    mean_NT: Tensor

    def __init__(
        self,
        input_dim: int,
        rep_dim: int,
        num_tasks: int,
        network_T: tuple[int, ...] | None,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.scale_T, self.shift_T = nn.Parameter(torch.zeros(num_tasks)), nn.Parameter(torch.zeros(num_tasks))
        self.has_networks = network_T is not None
        if network_T is None:
            return
        N, C, members = max(network_T) + 1, input_dim + rep_dim, Counter(network_T)
        into_CNV = torch.empty(C, N, 2 * WIDTH).uniform_(-1, 1, generator=generator) * math.sqrt(3 / max(C, 1))
        self.into_CNV = nn.Parameter(into_CNV)
        self.bias = nn.Parameter(torch.zeros(N * 2 * WIDTH))
        self.out_TW = nn.Parameter(torch.zeros(num_tasks, WIDTH))
        mean_NT = torch.tensor([[(m == n) / members[n] for m in network_T] for n in range(N)])
        self.register_buffer("network_T", torch.tensor(network_T))
        self.register_buffer("mean_NT", mean_NT)

    def forward(self, logits_BT: Tensor, x_BI: Tensor, tasks_BTH: Tensor, factor_T: Tensor) -> Tensor:
        """Of standardised columns; each task's gradient goes into its network with its factor. [B, T]."""
        correction_BT = logits_BT * self.scale_T + self.shift_T
        if not self.has_networks:
            return correction_BT
        input_dim = x_BI.shape[1]
        rep_BNH = self.mean_NT @ tasks_BTH
        of_rep_BNV = torch.einsum("bnh,hnv->bnv", rep_BNH, self.into_CNV[input_dim:])
        of_x_BM = torch.addmm(self.bias, x_BI, self.into_CNV[:input_dim].flatten(1))
        gate_BNW, value_BNW = (of_x_BM.view_as(of_rep_BNV) + of_rep_BNV).chunk(2, dim=2)
        hidden_BTW = (F.silu(gate_BNW) * (1 + value_BNW))[:, self.network_T]
        factor_T1 = factor_T.unsqueeze(1)
        hidden_BTW.register_hook(factor_T1.mul)  # type: ignore[no-untyped-call]  # torch ships no type for it
        return correction_BT + (hidden_BTW * self.out_TW).sum(dim=2)


class _Blocks:
    """Sums over blocks of equally many steps: when there are many, neighbours are merged."""

    def __init__(self) -> None:
        self._steps_each, self._steps_open = 1, 0
        self._blocks: list[tuple[Tensor, ...]] = []

    def add(self, *values: Tensor) -> None:
        """Add a step to the open block, and open a new one where that is full."""
        step = tuple(value.double().cpu() for value in values)
        if self._steps_open:
            self._blocks[-1] = _sum(self._blocks[-1], step)
        else:
            if len(self._blocks) == _MOST_BLOCKS:
                self._blocks = [_sum(*pair) for pair in zip(self._blocks[::2], self._blocks[1::2], strict=True)]
                self._steps_each *= 2
            self._blocks.append(step)
        self._steps_open = (self._steps_open + 1) % self._steps_each

    def state(self) -> dict[str, Tensor]:
        """What :meth:`load_state` continues from."""
        counts = {"steps": torch.tensor([self._steps_each, self._steps_open])}
        columns = zip(*self._blocks, strict=True)
        return counts | {f"column{i}": torch.stack(column) for i, column in enumerate(columns)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        self._steps_each, self._steps_open = state["steps"].tolist()
        columns = [state[f"column{i}"].unbind(0) for i in range(len(state) - 1)]
        self._blocks = list(zip(*columns, strict=True))

    def tables(self, num_tasks: int) -> tuple[Tensor, ...]:
        """Positives [S, T], losses [S, K, T], dot products [S, T, T]."""
        if not self._blocks:
            return torch.zeros(0, num_tasks), torch.zeros(0, 3, num_tasks), torch.zeros(0, num_tasks, num_tasks)
        return tuple(torch.stack(column) for column in zip(*self._blocks, strict=True))


def _sum(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(a + b for a, b in zip(one, other, strict=True))
