"""Experts and the combination of their outputs as compiled loops, for the CPU: values and gradients.

A library's products of some rows each cost more than the rows. Here one loop gathers an expert's rows, multiplies,
activates, and goes on to the next expert, forward and backward (docs/adr/0053-experts-as-compiled-loops.md). The packed
input of the first layer is never written. Letters as in :mod:`smes.rankers.sparse.experts`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from smes import team
from smes.rankers.kernels import on_host
from smes.rankers.sparse import expert_kernels as kernels
from smes.rankers.sparse.config import ExpertNorm
from smes.vector_code import product_kernel

KINDS: dict[ExpertNorm, int] = {"none": kernels.PLAIN, "layer": kernels.LAYER, "rms": kernels.RMS}
"""What follows a layer's product, by its norm."""

_WORTH_A_TEAM = 1 << 18  # numbers read or multiplied by a loop: some ten microseconds


def runs_here(x: Tensor) -> bool:
    """Whether the compiled loops may take the place of torch's operators for this input.

    Not in lower precision, on another device, while exporting, or where a mode watches torch's operators (one that
    counts operations).
    """
    return (
        on_host(x)
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()
        and not torch._C._len_torch_dispatch_stack()
    )


@dataclass(frozen=True, slots=True)
class Rows:
    """Which rows are executed, expert by expert.

    Attributes:
        ends_E: int32, the end of each expert's segment; rows that no segment covers become 0.
        instance_P: int64, the instance of each packed row.
        row_BU: int64, the packed rows of each instance.
        used_B: int64, how many of them count, from the first on; None: all U.
    """

    ends_E: Tensor
    instance_P: Tensor
    row_BU: Tensor
    used_B: Tensor | None


def expert_layer(
    x: Tensor, weight_EDH: Tensor, rows: Rows, kind: int, *, packed: bool = False, base_BH: Tensor | None = None
) -> Tensor:
    """One layer of all experts, ``SiLU(Norm(base + x W_e))``, for packed rows. → [P, H].

    Args:
        x: float32, of the instances, [B, D]; if ``packed``, of the rows, [P, D].
        weight_EDH: W; D and H are multiples of 8.
        rows: Which.
        kind: One of :data:`KINDS`, or :data:`smes.rankers.sparse.expert_kernels.LINEAR` for the product alone.
        packed: As said.
        base_BH: What is added for each instance.

    Raises:
        ValueError: Another width.
    """
    if weight_EDH.shape[1] % 8 or weight_EDH.shape[2] % 8:
        raise ValueError(f"weight: {list(weight_EDH.shape)}, expected [experts, input, output] of multiples of 8")
    if not torch.is_grad_enabled():
        return _layer(x, base_BH, weight_EDH, rows, kind, packed=packed, keep=False)[0]
    layer: Tensor = _Layer.apply(  # type: ignore[no-untyped-call]  # torch has no type
        x, base_BH, weight_EDH, rows, kind, packed
    )
    return layer


def weighted_rows(y_PH: Tensor, weights_BRK: Tensor, row_BRK: Tensor, *, shared: bool) -> Tensor:
    """``Σ_k w_brk y[row_brk]``. → [B, R, H].

    Args:
        y_PH: float32.
        weights_BRK: w.
        row_BRK: int64; only rows of the same instance may be the same.
        shared: Whether they may be.
    """
    if not torch.is_grad_enabled():
        B, R, K = row_BRK.shape
        return _summed(y_PH.contiguous(), weights_BRK.float().view(B * R, K), row_BRK.view(B * R, K), None).view(
            B, R, -1
        )
    sums: Tensor = _Sums.apply(y_PH, weights_BRK, row_BRK, shared)  # type: ignore[no-untyped-call]  # torch has no type
    return sums


def _layer(
    x: Tensor, base_BH: Tensor | None, weight_EDH: Tensor, rows: Rows, kind: int, *, packed: bool, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """The output, and if ``keep`` what comes before the activation."""
    E, D, H = weight_EDH.shape
    P = len(rows.instance_P)
    out_PH = x.new_empty(P, H)
    y_PH = x.new_empty(P, H) if keep and kind != kernels.LINEAR else None
    base_BH = None if base_BH is None else base_BH.contiguous()
    tensors = (rows.ends_E, rows.instance_P, x.contiguous(), base_BH, weight_EDH.contiguous(), y_PH, out_PH)
    team.run(
        kernels.layer(), (E, D, H, P, kind, int(packed), *_addresses(*tensors), _product()), _threads(P * D * H)
    )  # fmt: skip
    return out_PH, y_PH


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base_BH: Tensor | None, weight_EDH: Tensor, rows: Rows, kind: int, packed: bool
    ) -> Tensor:
        x, weight_EDH = x.contiguous(), weight_EDH.contiguous()
        out_PH, y_PH = _layer(x, base_BH, weight_EDH, rows, kind, packed=packed, keep=True)
        ctx.save_for_backward(x, weight_EDH, y_PH)
        ctx.rows, ctx.kind, ctx.packed = rows, kind, packed
        return out_PH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_EDH, y_PH = ctx.saved_tensors
        rows, kind, packed = ctx.rows, ctx.kind, ctx.packed
        (E, D, H), P = weight_EDH.shape, len(rows.instance_P)
        of_x, of_base, of_weight = ctx.needs_input_grad[:3]
        of_out_PH = gradients[0].contiguous()
        of_y_PH = x.new_empty(P, H) if of_base and kind != kernels.LINEAR else None
        of_x_PD = x.new_empty(P, D) if of_x else None
        of_weight_EDH = torch.empty_like(weight_EDH) if of_weight else None
        tensors = (
            rows.ends_E, rows.instance_P, x, of_out_PH, weight_EDH, y_PH, of_y_PH, of_x_PD, of_weight_EDH
        )  # fmt: skip
        numbers = (E, D, H, P, kind, int(packed), *_addresses(*tensors), _product())
        team.run(kernels.of_layer(), numbers, _threads(2 * P * D * H))
        of_base_BH = None
        if of_base:
            of_base_BH = _summed(of_out_PH if of_y_PH is None else of_y_PH, None, rows.row_BU, rows.used_B)
        if of_x_PD is not None and not packed:
            of_x_PD = _summed(of_x_PD, None, rows.row_BU, rows.used_B)
        return of_x_PD, of_base_BH, of_weight_EDH, None, None, None


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_PH: Tensor, weights_BRK: Tensor, row_BRK: Tensor, shared: bool) -> Tensor:
        B, R, K = row_BRK.shape
        y_PH, weights_BRK, row_BRK = y_PH.contiguous(), weights_BRK.float().contiguous(), row_BRK.contiguous()
        ctx.save_for_backward(y_PH, weights_BRK, row_BRK)
        ctx.shared = shared
        return _summed(y_PH, weights_BRK.view(B * R, K), row_BRK.view(B * R, K), None).view(B, R, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_PH, weights_BRK, row_BRK = ctx.saved_tensors
        B, R, K = row_BRK.shape
        of_sums_BRH = gradients[0].contiguous()
        of_y_PH = torch.zeros_like(y_PH) if ctx.shared else torch.empty_like(y_PH)
        of_weights_BRK = torch.empty_like(weights_BRK)
        tensors = (row_BRK, weights_BRK, y_PH, of_sums_BRH, of_y_PH, of_weights_BRK)
        H = y_PH.shape[1]
        numbers = (B, R, K, H, *_addresses(*tensors), int(ctx.shared))
        team.run(kernels.of_sums(), numbers, _threads(2 * B * R * K * H))
        return of_y_PH, of_weights_BRK, None, None


def _summed(y_PH: Tensor, weights_NK: Tensor | None, row_NK: Tensor, used_N: Tensor | None) -> Tensor:
    N, K = row_NK.shape
    H = y_PH.shape[1]
    out_NH = y_PH.new_empty(N, H)
    tensors = (row_NK.contiguous(), used_N, None if weights_NK is None else weights_NK.contiguous(), y_PH, out_NH)
    team.run(kernels.sum_rows(), (N, K, H, *_addresses(*tensors)), _threads(N * K * H))
    return out_NH


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _product() -> int:
    return int(product_kernel().address)


def _threads(work: int) -> int:
    return torch.get_num_threads() if work >= _WORTH_A_TEAM else 1
