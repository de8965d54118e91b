"""Search for task groups in the stream: tasks whose labels depend on the same products of input columns.

Two tasks belong together if the same columns of the input decide how each task's label depends on the other columns.
An example is a segment of users for whom both tasks' tastes differ. This shows without a router: what the model has not
explained of a label correlates with *products* of input columns. Which columns take part is a profile of the task.

Letters: B instances, T tasks, G groups, C columns of the input.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from smes.joint_batch import JointBatch
from smes.rankers.ranker import Clusters, RunningMoments, Undo

_GROUPED_AT = (1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
"""When the tasks are grouped, as shares of the search."""

_CLIP = 8.0  # as in the routers' input


class GroupFinder(nn.Module):
    """Collects a profile of each task for a while, and groups the tasks by their profiles from time to time.

    r are residuals (label minus prediction), x standardised columns. The sum ``S_t[c, k] = Σ_b r_bt x_bc x_bk`` tells
    how much column c changes what column k means to task t. Subtract from its square the squares of the single batches'
    sums: the difference has mean 0 if there is no such effect, however rare positives are and however skewed a column.
    Divided by its variance and summed over k, it is the profile of task t.

    Args:
        num_tasks: T.
        columns: C. While the search lasts, a batch costs ``T·B·C²`` multiply-adds, and the sums take ``(2·T + 1)·C²``
            numbers.
        num_groups: G ≤ T.
        until: The search ends after this many instances.
    """

    sum_TCC: Tensor
    squares_TCC: Tensor
    scale_CC: Tensor
    noise_T: Tensor

    def __init__(self, num_tasks: int, columns: int, num_groups: int, until: int) -> None:
        super().__init__()
        self._num_groups, self._until = num_groups, until
        self._seen = 0  # not a tensor: reading a tensor would wait for a GPU
        self.moments = RunningMoments(columns)
        for name in ("sum_TCC", "squares_TCC"):
            self.register_buffer(name, torch.zeros(num_tasks, columns, columns))
        self.register_buffer("scale_CC", torch.zeros(columns, columns))
        self.register_buffer("noise_T", torch.zeros(num_tasks))

    @property
    def done(self) -> bool:
        """Whether the search has ended."""
        return self._seen >= self._until

    @torch.no_grad()
    def observe(
        self, x_BC: Tensor, residual_BT: Tensor, taken: Tensor | None = None, batch: JointBatch | None = None
    ) -> Clusters | None:
        """Take in a batch after it was scored; return the groups when it is time for new ones.

        Args:
            x_BC: The ranker's input.
            residual_BT: Label minus prediction, 0 where there is no label.
            taken: bool scalar. If it is false, only the count of instances changes. None: it is true.
            batch: The batch of all ranks that these instances are part of; None: there is one rank.
        """
        standard_BC = self.moments.standardise(x_BC, _CLIP, torch.float32)
        if batch is not None:
            return self._observe_joint(batch, x_BC, standard_BC, residual_BT, taken)
        if taken is None:
            self.moments.observe(x_BC)
        else:
            undo = Undo(self.moments)
            undo.save()
            self.moments.observe(x_BC)
            undo.unless(taken)
            standard_BC, residual_BT = torch.where(taken, standard_BC, 0.0), torch.where(taken, residual_BT, 0.0)
        for t, residual_B in enumerate(residual_BT.unbind(dim=1)):
            part_CC = (standard_BC * residual_B.unsqueeze(1)).T @ standard_BC
            self.sum_TCC[t] += part_CC
            self.squares_TCC[t] += part_CC.square_()
        square_BC = standard_BC.square()
        self.scale_CC += square_BC.T @ square_BC
        self.noise_T += residual_BT.square().sum(dim=0)
        return self._count(len(x_BC))

    def _observe_joint(
        self, batch: JointBatch, x_BC: Tensor, standard_BC: Tensor, residual_BT: Tensor, taken: Tensor | None
    ) -> Clusters | None:
        parts = [(standard_BC * residual_B.unsqueeze(1)).T @ standard_BC for residual_B in residual_BT.unbind(dim=1)]
        square_BC = standard_BC.square()
        sums = [torch.stack([*parts, square_BC.T @ square_BC]), residual_BT.square().sum(dim=0)]
        if batch.own == 0:
            sums = [torch.zeros_like(one) for one in sums]
        moments_3C = self.moments.sums(batch, x_BC)
        batch.world.sum([*sums, moments_3C])
        if taken is not None:
            sums = [torch.where(taken, one, 0.0) for one in sums]
            moments_3C = torch.where(taken, moments_3C, 0.0)
        self.moments.take_in(moments_3C)
        *parts, scale_CC = sums[0].unbind()
        for t, part_CC in enumerate(parts):
            self.sum_TCC[t] += part_CC
            self.squares_TCC[t] += part_CC.square()
        self.scale_CC += scale_CC
        self.noise_T += sums[1]
        groups = self._count(batch.instances)
        return None if groups is None else batch.decided(groups)

    def _count(self, instances: int) -> Clusters | None:
        """Count instances; the groups, when it is time for new ones."""
        before, self._seen = self._seen, self._seen + instances
        if any(before < share * self._until <= self._seen for share in _GROUPED_AT):
            return clusters(likeness(self.profiles().cpu()), self._num_groups)
        return None

    def forget(self, instances: int) -> None:
        """Take so many instances back: the step on them was not taken."""
        self._seen -= instances

    def profiles(self) -> Tensor:
        """How much each column changes what the others mean to each task; 0 is not at all. float32 [T, C]."""
        variance_TCC = self.noise_T.view(-1, 1, 1) / max(self._seen, 1) * self.scale_CC
        energy_TCC = (self.sum_TCC.square() - self.squares_TCC) / variance_TCC.clamp(min=1e-9)
        return energy_TCC.sum(dim=2) - energy_TCC.diagonal(dim1=1, dim2=2)

    def state(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of everything that :meth:`load_state` needs."""
        return {"seen": torch.tensor(self._seen), **{k: v.cpu().clone() for k, v in self.state_dict().items()}}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a :meth:`state`.

        Raises:
            KeyError, RuntimeError: A tensor is missing, unknown or of another shape.
        """
        self._seen = int(state["seen"])
        self.load_state_dict({name: tensor for name, tensor in state.items() if name != "seen"})


def likeness(profiles_TC: Tensor) -> Tensor:
    """Cosine of every two tasks' profiles. float32 [T, T].

    Profiles are scaled to length 1. Subtract the mean profile, which carries no information about groups.
    """
    unit_TC = nn.functional.normalize(profiles_TC)
    unit_TC = nn.functional.normalize(unit_TC - unit_TC.mean(dim=0))
    return unit_TC @ unit_TC.T


def clusters(like_TT: Tensor, num_groups: int) -> Clusters:
    """Cluster the tasks by average linkage: start with one group per task, join the two most alike until G are left.

    Args:
        like_TT: The :func:`likeness` of every two tasks.
        num_groups: G, from 1 to T.
    """
    groups: list[tuple[int, ...]] = [(t,) for t in range(len(like_TT))]

    def mean_likeness(pair: Sequence[tuple[int, ...]]) -> float:
        return float(like_TT[list(pair[0])][:, list(pair[1])].mean())

    while len(groups) > num_groups:
        one, other = max(combinations(groups, 2), key=mean_likeness)
        groups = [group for group in groups if group not in (one, other)] + [tuple(sorted(one + other))]
    return tuple(sorted(groups))
