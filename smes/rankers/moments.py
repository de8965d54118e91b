"""Mean and variance of columns over a stream, as part of the model's state. Letters: B instances, C columns."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RunningMoments(nn.Module):
    """Mean and variance per column over the values seen so far (Chan et al.'s merge of batch moments, in float64).

    Args:
        columns: C.
        horizon: From this many values on, old values fade out exponentially, so that the moments follow a drift.
    """

    count_C: Tensor
    mean_C: Tensor
    variance_C: Tensor

    def __init__(self, columns: int, horizon: float = 1e6) -> None:
        super().__init__()
        self._horizon = horizon
        self.register_buffer("count_C", torch.zeros(columns, dtype=torch.float64))
        self.register_buffer("mean_C", torch.zeros(columns, dtype=torch.float64))
        self.register_buffer("variance_C", torch.ones(columns, dtype=torch.float64))

    @torch.no_grad()
    def observe(self, x_BC: Tensor, weight_BC: Tensor | None = None) -> None:
        """Take in a batch.

        Args:
            x_BC: The values, all finite.
            weight_BC: Their weights; values of weight 0 do not count. None: all weights are 1, and the batch's moments
                are computed in the precision of ``x_BC``, which is much faster. Columns must then deviate by at least
                about 1e-5 of their size, as embeddings do.
        """
        if weight_BC is None:
            mean_C, variance_C = self._batch_moments(x_BC)
            new_C = torch.full_like(mean_C, len(x_BC))
        else:
            x_BC, weight_BC = x_BC.double(), weight_BC.double()
            new_C = weight_BC.sum(dim=0)
            mean_C = (x_BC * weight_BC).sum(dim=0) / new_C.clamp(min=1e-12)
            variance_C = ((x_BC - mean_C).square() * weight_BC).sum(dim=0) / new_C.clamp(min=1e-12)
        total_C = self.count_C + new_C
        share_C = new_C / total_C.clamp(min=1e-12)
        delta_C = mean_C - self.mean_C
        # For the first batch share is 1, so the initial variance of 1 drops out.
        merged_C = (1 - share_C) * self.variance_C + share_C * variance_C + share_C * (1 - share_C) * delta_C.square()
        self.variance_C.copy_(merged_C)
        self.mean_C.add_(share_C * delta_C)
        self.count_C.copy_(total_C.clamp(max=self._horizon))

    def standardise(self, x_BC: Tensor, clip: float, dtype: torch.dtype = torch.float64) -> Tensor:
        """``(x - mean) / std``, clipped at ±``clip`` and computed in ``dtype``. float32 [B, C]."""
        scale_C = self.variance_C.clamp(min=1e-12).rsqrt()
        shift_C = -self.mean_C * scale_C
        z_BC = torch.addcmul(shift_C.to(dtype), x_BC.to(dtype), scale_C.to(dtype))
        return F.hardtanh_(z_BC, -clip, clip).float()  # in place: each pass over [B, C] costs time

    def _batch_moments(self, x_BC: Tensor) -> tuple[Tensor, Tensor]:
        # Sums of differences from an estimate of the mean, and of their squares: along columns on the CPU this takes a
        # tenth of the time of torch.var_mean, and is as exact if the estimate is good.
        near_C = torch.where(self.count_C > 0, self.mean_C.to(x_BC.dtype), x_BC[0])
        difference_BC = x_BC - near_C
        mean_C = difference_BC.mean(dim=0).double()
        variance_C = difference_BC.square_().mean(dim=0).double() - mean_C.square()
        return near_C + mean_C, variance_C.clamp_(min=0.0)
