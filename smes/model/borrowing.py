"""Rare tasks borrow from denser ones: an instance's base rate follows what is predicted for the denser tasks.

A rare task has too few positives to learn which users and items they come from. With which *other* labels they come
shows much sooner: on the public log half of the follows come with a like, which makes a follow 27 times as likely.

Letters: B instances, T tasks.
"""

import torch
from torch import Tensor, nn

_RIDGE = 0.1
_LEAST = 0.1  # the least factor of a base rate; its inverse is the greatest
_HORIZON = 1e7  # labels; longer than that of the base rates: pairs of labels are rarer


class LabelRegression(nn.Module):
    """The regression of a binary task's label on the labels of denser binary tasks, applied to their predictions.

    The base rate μ_t becomes ``E_t = μ_t + Σ_s β_ts (p_s − μ_s)``, kept within a factor of 10 of μ_t. β_t is the ridge
    regression ``(C_ss + 0.1·diag(C_ss))⁻¹ C_st`` from the running covariances C of the labels. It is counted, not
    learned, and costs T² multiplications for an instance. E_t is exact if the label of t depends on the instance only
    through the denser labels, linearly. What else it depends on is left to the task's own logit.

    Args:
        num_tasks: T.
        ratio: Task t borrows from the tasks s that have at least this many times as many positives, > 1.
    """

    count_TT: Tensor
    sum_TT: Tensor
    product_TT: Tensor
    weight_TT: Tensor

    def __init__(self, num_tasks: int, ratio: float) -> None:
        super().__init__()
        self._ratio = ratio
        # Over the examples with labels of both tasks: how many, the sum of t's labels, and the sum of their products.
        for name in ("count_TT", "sum_TT", "product_TT"):
            self.register_buffer(name, torch.zeros(num_tasks, num_tasks, dtype=torch.float64))
        self.register_buffer("weight_TT", torch.zeros(num_tasks, num_tasks))

    def forward(self, rate_BT: Tensor, mean_T: Tensor) -> Tensor:
        """What to add to the logits.

        Args:
            rate_BT: p, the predictions of the tasks by themselves; no gradient goes through them. Any finite value for
                regression tasks.
            mean_T: μ, the tasks' base rates. Likewise.

        Returns:
            ``logit(E) − logit(μ)``; 0 for tasks that do not borrow. float32 [B, T].
        """
        change_BT = (rate_BT.detach() - mean_T) @ self.weight_TT.T
        borrows_T = (self.weight_TT != 0).any(dim=1)
        mean_T = torch.where(borrows_T, mean_T, 0.5)
        most_T = torch.minimum(mean_T / _LEAST, (1 + mean_T) / 2)
        expected_BT = (mean_T + change_BT).clamp(mean_T * _LEAST, most_T)
        return expected_BT.logit() - mean_T.logit()

    @torch.no_grad()
    def observe(self, labels_BT: Tensor, weight_BT: Tensor, is_binary_T: Tensor) -> None:
        """Take in a batch and solve for β.

        Args:
            labels_BT: All finite.
            weight_BT: Sample weights; 0 where there is no label.
            is_binary_T: bool.
        """
        present_BT, weight_BT = (weight_BT > 0).double(), weight_BT.double()
        weighted_BT = labels_BT.double() * weight_BT
        self.count_TT.add_(weight_BT.T @ present_BT)
        self.sum_TT.add_(weighted_BT.T @ present_BT)
        self.product_TT.add_(weighted_BT.T @ (labels_BT.double() * present_BT))
        fade_TT = (_HORIZON / self.count_TT).clamp(max=1.0)
        for sums_TT in (self.count_TT, self.sum_TT, self.product_TT):
            sums_TT.mul_(fade_TT)
        mean_TT = self.sum_TT / self.count_TT.clamp(min=1e-12)
        covariance_TT = self.product_TT / self.count_TT.clamp(min=1e-12) - mean_TT * mean_TT.T
        lends_TT = self._lends(is_binary_T)
        # One system for each task, with the rows of the tasks that do not lend to it replaced by those of the identity.
        ridge_TT = covariance_TT + torch.diag(_RIDGE * covariance_TT.diagonal() + 1e-9)
        both_TTT = lends_TT.unsqueeze(1) & lends_TT.unsqueeze(2)
        systems_TTT = torch.where(
            both_TTT, ridge_TT, torch.eye(len(ridge_TT), dtype=torch.float64, device=ridge_TT.device)
        )
        right_TT1 = torch.where(lends_TT, covariance_TT, 0.0).unsqueeze(2)
        # solve_ex: solve would wait for a GPU to learn of singular systems, and the ridge leaves none.
        solved_TT = torch.linalg.solve_ex(systems_TTT, right_TT1).result.squeeze(2)
        self.weight_TT.copy_(torch.where(lends_TT, solved_TT, 0.0))

    def _lends(self, is_binary_T: Tensor) -> Tensor:
        """Which tasks lend to which. bool [T, T]: row t borrows from column s."""
        positives_T = self.sum_TT.diagonal()
        enough_TT = positives_T.unsqueeze(0) >= self._ratio * positives_T.unsqueeze(1)
        return enough_TT & (positives_T > 0).unsqueeze(1) & is_binary_T.unsqueeze(1) & is_binary_T.unsqueeze(0)
