"""Rare tasks borrow from denser ones: an instance's base rate follows what is predicted for the denser tasks.

A rare task has too few positives to learn which users and items they come from. With which *other* labels they come
shows much sooner: on the public log half of the follows come with a like, which makes a follow 27 times as likely.

Letters: B instances, T tasks.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from smes.model.borrowing_kernels import add_borrowed, add_pairs, solve_pairs
from smes.rankers.kernels import on_host

_RIDGE = 0.1
_LEAST = 0.1  # the least factor of a base rate; its inverse is the greatest
_HORIZON = 1e7  # labels; longer than that of the base rates: pairs of labels are rarer


class LabelRegression(nn.Module):
    """The regression of a binary task's label on the labels of denser binary tasks, applied to their predictions.

    The base rate μ_t becomes ``E_t = μ_t + Σ_s β_ts (p_s − μ_s)``, kept within a factor of 10 of μ_t. β_t is the ridge
    regression ``(C_ss + 0.1·diag(C_ss))⁻¹ C_st`` from the running covariances C of the labels. It is counted, not
    learned, and costs T² multiplications for an instance. E_t is exact if the label of t depends on the instance only
    through the denser labels, linearly. What else it depends on is left to the task's own logit. If tasks are labelled
    on different examples, C may not be positive definite; then β stays what it was.

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

    def add_to(self, logits_BT: Tensor, base_T: Tensor) -> Tensor:
        """Add what is borrowed to the tasks' own logits.

        Args:
            logits_BT: float32, with base rates.
            base_T: float32, the base rates as logits.
        """
        if not on_host(logits_BT):
            borrowed_BT: Tensor = self(logits_BT.sigmoid(), base_T.sigmoid())
            return logits_BT + borrowed_BT
        if not self.weight_TT.numpy().any():
            return logits_BT
        added_BT = torch.zeros(logits_BT.shape)
        rate_BT = logits_BT.detach().sigmoid()
        add_borrowed(rate_BT.numpy(), base_T.numpy(), self.weight_TT.numpy(), _LEAST, added_BT.numpy())
        return logits_BT + added_BT

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
        if on_host(self.count_TT):
            self._add(labels_BT, weight_BT, self._sums, _HORIZON)
            self._solve_here(is_binary_T)
        else:
            self.take_in(self.sums(labels_BT, weight_BT), is_binary_T)

    @torch.no_grad()
    def sums(self, labels_BT: Tensor, weight_BT: Tensor) -> Tensor:
        """What :meth:`take_in` takes of a batch, or of a rank's part of one. float64 [3, T, T]."""
        if on_host(self.count_TT):
            sums_3TT = torch.zeros(3, *self.count_TT.shape, dtype=torch.float64)
            self._add(labels_BT, weight_BT, sums_3TT.unbind(), math.inf)
            return sums_3TT
        present_BT, weight_BT = (weight_BT > 0).double(), weight_BT.double()
        weighted_BT = labels_BT.double() * weight_BT
        products_TT = weighted_BT.T @ (labels_BT.double() * present_BT)
        return torch.stack([weight_BT.T @ present_BT, weighted_BT.T @ present_BT, products_TT])

    @torch.no_grad()
    def take_in(self, sums_3TT: Tensor, is_binary_T: Tensor) -> None:
        """Take in the sums over a batch, and solve for β."""
        for sums_TT, new_TT in zip(self._sums, sums_3TT, strict=True):
            sums_TT.add_(new_TT)
        fade_TT = (_HORIZON / self.count_TT).clamp(max=1.0)
        for sums_TT in self._sums:
            sums_TT.mul_(fade_TT)
        if on_host(self.count_TT):
            self._solve_here(is_binary_T)
            return
        mean_TT = self.sum_TT / self.count_TT.clamp(min=1e-12)
        covariance_TT = self.product_TT / self.count_TT.clamp(min=1e-12) - mean_TT * mean_TT.T
        self._solve(torch.where(is_binary_T & is_binary_T.unsqueeze(1), covariance_TT, 0.0), is_binary_T)

    @property
    def _sums(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.count_TT, self.sum_TT, self.product_TT

    def _add(self, labels_BT: Tensor, weight_BT: Tensor, sums: Sequence[Tensor], horizon: float) -> None:
        cells = (labels_BT.double().contiguous().numpy(), weight_BT.double().contiguous().numpy())
        add_pairs(*cells, horizon, *(tensor.numpy() for tensor in sums))

    def _solve_here(self, is_binary_T: Tensor) -> None:
        """Solve by the compiled loop."""
        sums = (tensor.numpy() for tensor in self._sums)
        solve_pairs(*sums, is_binary_T.numpy(), self._ratio, _RIDGE, self.weight_TT.numpy())

    def _solve(self, covariance_TT: Tensor, is_binary_T: Tensor) -> None:
        """Solve for the β of all tasks with one Cholesky factor.

        In the order of their positives, the tasks that lend to a task are the first so many. A leading block of the
        factor is the factor of the leading block, so each task's system is a part of the whole one.
        """
        order_T = torch.where(is_binary_T, self.sum_TT.diagonal(), -1.0).argsort(descending=True, stable=True)
        lends_TT, covariance_TT = self._lends(is_binary_T)[order_T][:, order_T], covariance_TT[order_T][:, order_T]
        ridge_TT = covariance_TT + torch.diag(_RIDGE * covariance_TT.diagonal() + 1e-9)
        # cholesky_ex: cholesky would wait for a GPU to learn whether it failed.
        factor_TT, failed = torch.linalg.cholesky_ex(ridge_TT)
        half_TT = torch.linalg.solve_triangular(factor_TT, covariance_TT, upper=False)
        half_TT = torch.where(lends_TT.T, half_TT, 0.0)
        solved_TT = torch.linalg.solve_triangular(factor_TT.T, half_TT, upper=True).T
        place_T = order_T.argsort()
        weight_TT = torch.where(lends_TT, solved_TT, 0.0)[place_T][:, place_T].to(self.weight_TT.dtype)
        self.weight_TT.copy_(torch.where(failed == 0, weight_TT, self.weight_TT))

    def _lends(self, is_binary_T: Tensor) -> Tensor:
        """Which tasks lend to which. bool [T, T]: row t borrows from column s."""
        positives_T = self.sum_TT.diagonal()
        enough_TT = positives_T.unsqueeze(0) >= self._ratio * positives_T.unsqueeze(1)
        return enough_TT & (positives_T > 0).unsqueeze(1) & is_binary_T.unsqueeze(1) & is_binary_T.unsqueeze(0)
