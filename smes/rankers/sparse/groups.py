"""Task groups found from the stream: which tasks' answers the same inputs change.

Two tasks belong together where the same columns of the input decide how each of them reads the others: a segment under
which a task's tastes differ, say. That shows without any router: what a model has not explained of a label goes with
*products* of input columns, and with which columns is a profile of the task.

Letters: B instances, T tasks, G groups, and as many pools, C columns of the input.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations, product

import torch
from torch import Tensor, nn

from smes.rankers.moments import RunningMoments

Clusters = tuple[tuple[int, ...], ...]
"""Tasks of each group."""

_LOOKS = (1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
"""When the tasks are grouped, as shares of the search."""

_CLIP = 8.0  # as routers cut what they read


class GroupFinder(nn.Module):
    """Collects the tasks' profiles for a while, and groups the tasks by them from time to time.

    With residuals r (label minus prediction) and standardised columns x, the sum ``S_t[c, k] = Σ_b r_bt x_bc x_bk``
    says how much column c changes what column k means to task t. Its square less the squares of the batches' own parts
    has a mean of 0 where there is nothing to say, however rare a positive and however skewed a column. Over its
    variance and summed over k it is the profile of t. What all tasks' profiles have in common says nothing: the mean is
    taken off them.

    Args:
        num_tasks: T.
        columns: C. A batch costs ``T·B·C²`` multiply-adds, and the sums ``(2·T + 1)·C²`` numbers, while it lasts.
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
        self._seen = 0  # not a tensor: a GPU would have to be waited for
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
    def observe(self, x_BC: Tensor, residual_BT: Tensor) -> Clusters | None:
        """Take in a batch, after it was scored; the groups, when it is time for them.

        Args:
            x_BC: What the ranker read.
            residual_BT: Label minus prediction, 0 where there is no label.
        """
        standard_BC = self.moments.standardise(x_BC, _CLIP, torch.float32)
        self.moments.observe(x_BC)
        for t, residual_B in enumerate(residual_BT.unbind(dim=1)):
            part_CC = (standard_BC * residual_B.unsqueeze(1)).T @ standard_BC
            self.sum_TCC[t] += part_CC
            self.squares_TCC[t] += part_CC.square_()
        square_BC = standard_BC.square()
        self.scale_CC += square_BC.T @ square_BC
        self.noise_T += residual_BT.square().sum(dim=0)
        before, self._seen = self._seen, self._seen + len(x_BC)
        if any(before < share * self._until <= self._seen for share in _LOOKS):
            return clusters(likeness(self.profiles().cpu()), self._num_groups)
        return None

    def profiles(self) -> Tensor:
        """How much each column changes what the others mean to each task; 0 is nothing. float32 [T, C]."""
        variance_TCC = self.noise_T.view(-1, 1, 1) / max(self._seen, 1) * self.scale_CC
        energy_TCC = (self.sum_TCC.square() - self.squares_TCC) / variance_TCC.clamp(min=1e-9)
        return energy_TCC.sum(dim=2) - energy_TCC.diagonal(dim1=1, dim2=2)

    def state(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of all from which :meth:`load_state` goes on."""
        return {"seen": torch.tensor(self._seen), **{k: v.cpu().clone() for k, v in self.state_dict().items()}}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a :meth:`state`.

        Raises:
            KeyError, RuntimeError: A tensor is missing, unknown or of another shape.
        """
        self._seen = int(state["seen"])
        self.load_state_dict({name: tensor for name, tensor in state.items() if name != "seen"})


class TaskReads(nn.Module):
    """Which pool each task reads: the mean of all of them until groups are found, then its group's.

    Args:
        num_tasks: T.
        num_groups: G.
    """

    share_TG: Tensor

    def __init__(self, num_tasks: int, num_groups: int) -> None:
        super().__init__()
        if num_groups > num_tasks:
            raise ValueError(f"smes.found_groups: {num_groups}, expected at most the number of tasks ({num_tasks})")
        self.register_buffer("share_TG", torch.full((num_tasks, num_groups), 1 / num_groups))

    def outputs(self, y_BGH: Tensor) -> Tensor:
        """What each task reads of the pools' outputs. [B, G, H] → [B, T, H]."""
        return torch.matmul(self.share_TG.to(y_BGH.dtype), y_BGH)

    def load(self, load_GE: Tensor) -> Tensor:
        """Instances that each task sends to each expert, from those that each pool's router does. int64 [T, E]."""
        return ((self.share_TG > 0).unsqueeze(2) * load_GE).sum(dim=1)

    def main(self) -> Tensor:
        """The pool that each task reads; while it reads all, the first. int64 [T]."""
        return self.share_TG.argmax(dim=1)

    def regroup(self, groups: Clusters) -> None:
        """Each group reads one pool: the one that most of its tasks read already, so that little has to be relearned.

        Args:
            groups: G of them, with every task in one.
        """
        share_TG = self.share_TG.cpu()
        stay_GG = torch.stack([share_TG[list(group)].sum(dim=0) for group in groups])
        G = len(groups)
        pool_of: dict[int, int] = {}
        for group, pool in sorted(product(range(G), range(G)), key=lambda pair: -float(stay_GG[pair])):
            if group not in pool_of and pool not in pool_of.values():
                pool_of[group] = pool
        share_TG = torch.zeros_like(share_TG)
        for group, tasks in enumerate(groups):
            share_TG[list(tasks), pool_of[group]] = 1.0
        self.share_TG.copy_(share_TG)


def likeness(profiles_TC: Tensor) -> Tensor:
    """Cosine of two tasks' profiles, each of length 1 and less the mean of all. float32 [T, T]."""
    unit_TC = nn.functional.normalize(profiles_TC)
    unit_TC = nn.functional.normalize(unit_TC - unit_TC.mean(dim=0))
    return unit_TC @ unit_TC.T


def clusters(like_TT: Tensor, num_groups: int) -> Clusters:
    """Groups by average linkage: from one a task, the two most alike are joined until there are G.

    Args:
        like_TT: How alike two tasks are.
        num_groups: G, from 1 to T.
    """
    groups: list[tuple[int, ...]] = [(t,) for t in range(len(like_TT))]

    def mean_likeness(pair: Sequence[tuple[int, ...]]) -> float:
        return float(like_TT[list(pair[0])][:, list(pair[1])].mean())

    while len(groups) > num_groups:
        one, other = max(combinations(groups, 2), key=mean_likeness)
        groups = [group for group in groups if group not in (one, other)] + [tuple(sorted(one + other))]
    return tuple(sorted(groups))
