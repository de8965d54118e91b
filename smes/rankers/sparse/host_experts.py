"""Experts and the combination of their outputs as compiled loops, for the CPU: values and gradients.

A library's products of some rows each cost more than the rows. Here one loop gathers an expert's rows, multiplies,
activates, and goes on to the next expert, forward and backward (docs/adr/0053-experts-as-compiled-loops.md). The packed
input of the first layer is never written. Letters as in :mod:`smes.rankers.sparse.experts`.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

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

_Rows = TypeVar("_Rows", Tensor, Tensor | None)

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
        slot_BRK: int64, the place among an instance's rows of each of a router's; None: ``r·K + k``.
        place_P: int64, where in ``row_BU`` viewed as [B·U] each packed row is.
    """

    ends_E: Tensor
    instance_P: Tensor
    row_BU: Tensor
    used_B: Tensor | None
    slot_BRK: Tensor | None
    place_P: Tensor


def expert_layer(x: Tensor, weight_EDH: Tensor, rows: Rows, kind: int, *, packed: bool = False) -> Tensor:
    """One layer of all experts, ``SiLU(Norm(x W_e))``, for packed rows. → [P, H].

    Args:
        x: float32, of the instances, [B, D]; if ``packed``, of the rows, [P, D].
        weight_EDH: W; D and H are multiples of 8.
        rows: Which.
        kind: One of :data:`KINDS`, or :data:`smes.rankers.sparse.expert_kernels.LINEAR` for the product alone.
        packed: As said.

    Raises:
        ValueError: Another width.
    """
    _check(weight_EDH)
    if not torch.is_grad_enabled():
        return _layer(x, weight_EDH, rows, kind, packed=packed, keep=False)[0]
    layer: Tensor = _Layer.apply(  # type: ignore[no-untyped-call]  # torch has no type
        x, weight_EDH, rows, kind, packed
    )
    return layer


def mixture(
    x: Tensor, weight_EDH: Tensor, weights_BRK: Tensor, rows: Rows, kind: int, *, packed: bool = False,
    base_BH: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The last layer of all experts and the weighted sums of its outputs, which are never written. → [B, R, H].

    Args:
        x: As of :func:`expert_layer`.
        weight_EDH: W, as there.
        weights_BRK: Of each router's experts.
        rows: As there.
        kind: One of :data:`KINDS`.
        packed: As there.
        base_BH: What is added for each instance before norm and activation; its rows may be those of a wider matrix.

    Raises:
        ValueError: As there.
    """
    _check(weight_EDH)
    if not torch.is_grad_enabled():
        out_PH, _ = _layer(x, weight_EDH, rows, kind, packed=packed, base_BH=base_BH, keep=False)
        return weighted_sums(out_PH, rows, weights_BRK.float().contiguous())
    mixed: Tensor = _Mixture.apply(  # type: ignore[no-untyped-call]  # torch has no type
        x, base_BH, weight_EDH, weights_BRK, rows, kind, packed
    )
    return mixed


def _check(weight_EDH: Tensor) -> None:
    if weight_EDH.shape[1] % 8 or weight_EDH.shape[2] % 8:
        raise ValueError(f"weight: {list(weight_EDH.shape)}, expected [experts, input, output] of multiples of 8")


def _layer(
    x: Tensor, weight_EDH: Tensor, rows: Rows, kind: int, *, packed: bool, keep: bool, base_BH: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The output, and if ``keep`` what comes before norm and activation."""
    E, D, H = weight_EDH.shape
    P = len(rows.instance_P)
    out_PH = x.new_empty(P, H)
    y_PH = x.new_empty(P, H) if keep and kind != kernels.LINEAR else None
    x, base_BH, weight_EDH = _ready(x, packed=packed), _by_rows(base_BH), weight_EDH.contiguous()
    pointers = _addresses(rows.ends_E, rows.instance_P, x, weight_EDH, y_PH, out_PH)
    numbers = (E, D, H, P, kind, int(packed), x.stride(0), *pointers, _product(), *_base(base_BH))
    team.run(kernels.layer(), numbers, _threads(P * D * H))
    return out_PH, y_PH


def weighted_sums(y_PH: Tensor, rows: Rows, weights_BRK: Tensor) -> Tensor:
    """The weighted sums of packed rows for each router. float32 [P, H], [B, R, K] → [B, R, H]."""
    (B, R, K), U, H = weights_BRK.shape, rows.row_BU.shape[1], y_PH.shape[1]
    out_BRH = y_PH.new_empty(B, R, H)
    pointers = _addresses(rows.row_BU, None, rows.slot_BRK, weights_BRK, y_PH, out_BRH)
    team.run(kernels.sum_rows(), (B, R, K, U, H, *pointers), _threads(B * R * K * H))
    return out_BRH


def _of_instances(of_rows_PD: Tensor, rows: Rows) -> Tensor:
    """The sum of each instance's rows. → [B, D]."""
    (B, U), D = rows.row_BU.shape, of_rows_PD.shape[1]
    out_BD = of_rows_PD.new_empty(B, D)
    pointers = _addresses(rows.row_BU, rows.used_B, None, None, of_rows_PD, out_BD)
    team.run(kernels.sum_rows(), (B, 1, U, U, D, *pointers), _threads(B * U * D))
    return out_BD


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_EDH: Tensor, rows: Rows, kind: int, packed: bool) -> Tensor:
        x, weight_EDH = _ready(x, packed=packed), weight_EDH.contiguous()
        out_PH, y_PH = _layer(x, weight_EDH, rows, kind, packed=packed, keep=True)
        ctx.save_for_backward(x, weight_EDH, y_PH)
        ctx.rows, ctx.kind, ctx.packed = rows, kind, packed
        return out_PH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_EDH, y_PH = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        of_out_PH = gradients[0].contiguous()
        return *_of_layer(ctx, x, weight_EDH, y_PH, of_out_PH, [0] * 9, wanted), None, None, None


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base_BH: Tensor | None, weight_EDH: Tensor, weights_BRK: Tensor, rows: Rows, kind: int,
        packed: bool,
    ) -> Tensor:  # fmt: skip
        x, weight_EDH, weights_BRK = _ready(x, packed=packed), weight_EDH.contiguous(), weights_BRK.float().contiguous()
        out_PH, y_PH = _layer(x, weight_EDH, rows, kind, packed=packed, keep=True, base_BH=base_BH)
        ctx.save_for_backward(x, weight_EDH, weights_BRK, y_PH)
        ctx.rows, ctx.kind, ctx.packed = rows, kind, packed
        return weighted_sums(out_PH, rows, weights_BRK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_EDH, weights_BRK, y_PH = ctx.saved_tensors
        rows: Rows = ctx.rows
        of_out_BRH, of_weights_BRK = gradients[0].contiguous(), torch.empty_like(weights_BRK)
        of_y_PH = torch.empty_like(y_PH) if ctx.needs_input_grad[1] else None
        of_y, place = _addresses(of_y_PH, rows.place_P)
        shape = (*weights_BRK.shape, rows.row_BU.shape[1])
        sums = [of_y, place, *shape, *_addresses(rows.slot_BRK, weights_BRK, of_weights_BRK)]
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        of_x, of_weight_EDH = _of_layer(ctx, x, weight_EDH, y_PH, of_out_BRH, sums, wanted)
        of_base_BH = None if of_y_PH is None else _of_instances(of_y_PH, rows)
        return of_x, of_base_BH, of_weight_EDH, of_weights_BRK, None, None, None


def _of_layer(
    ctx: Any, x: Tensor, weight_EDH: Tensor, y_PH: Tensor | None, of_out: Tensor, sums: list[int],
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x and of the weight, if wanted; ``sums``: the loop's last arguments."""
    rows: Rows = ctx.rows
    (E, D, H), P = weight_EDH.shape, len(rows.instance_P)
    of_x_PD = x.new_empty(P, D) if wanted[0] else None
    of_weight_EDH = torch.empty_like(weight_EDH) if wanted[1] else None
    pointers = _addresses(rows.ends_E, rows.instance_P, x, of_out, weight_EDH, y_PH, of_x_PD, of_weight_EDH)
    numbers = (E, D, H, P, ctx.kind, int(ctx.packed), x.stride(0), *pointers, _product(), *sums)
    team.run(kernels.of_layer(), numbers, _threads(2 * P * D * H))
    if of_x_PD is not None and not ctx.packed:
        of_x_PD = _of_instances(of_x_PD, rows)
    return of_x_PD, of_weight_EDH


def _ready(x: Tensor, *, packed: bool) -> Tensor:
    return x.contiguous() if packed else _by_rows(x)


def _by_rows(x: _Rows) -> _Rows:
    """The matrix, or a copy, whose rows are neighbouring numbers."""
    return x if x is None or x.stride(1) == 1 else x.contiguous()


def _base(base_BH: Tensor | None) -> tuple[int, int]:
    return (0, 0) if base_BH is None else (base_BH.data_ptr(), base_BH.stride(0))


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _product() -> int:
    return int(product_kernel().address)


def _threads(work: int) -> int:
    return torch.get_num_threads() if work >= _WORTH_A_TEAM else 1
