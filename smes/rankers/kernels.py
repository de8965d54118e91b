"""A compiled loop over what rankers read, for the CPU. Letters: B instances, C columns."""

import torch
from torch import Tensor

from smes.rankers.column_kernels import sums_of_columns


def on_host(x: Tensor) -> bool:
    """Whether compiled loops may read it: on the CPU, with values (none while a model is traced)."""
    return type(x) is Tensor and x.device.type == "cpu"


def column_sums(x_BC: Tensor, near_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In one pass, of the differences from ``near_C``: sum, sum of squares, largest size. float32 [C] each.

    Args:
        x_BC: float32, on the host; B ≥ 1.
        near_C: float32.
    """
    sum_C, squares_C, most_C = torch.zeros(3, x_BC.shape[1]).unbind()
    x_BC = x_BC.detach().contiguous()
    sums_of_columns(x_BC.numpy(), near_C.contiguous().numpy(), sum_C.numpy(), squares_C.numpy(), most_C.numpy())
    return sum_C, squares_C, most_C
