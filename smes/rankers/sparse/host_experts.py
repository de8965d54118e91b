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
        row_BU: int64, the packed rows of each instance; its width is U.
        slot_BRK: int64, the place among an instance's rows of each of a router's; None: ``r·K + k``.
        place_P: int64, where in ``row_BU`` viewed as [B·U] each packed row is.
    """

    ends_E: Tensor
    instance_P: Tensor
    row_BU: Tensor
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
        ValueError: Another width, shape, type or device.
    """
    _check(x, weight_EDH, rows, packed=packed)
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
    _check(x, weight_EDH, rows, packed=packed, base_BH=base_BH, weights_BRK=weights_BRK)
    if not torch.is_grad_enabled():
        return _mixture(
            x, base_BH, weight_EDH, weights_BRK.float().contiguous(), rows, kind, packed=packed, keep=False
        )[0]
    mixed: Tensor = _Mixture.apply(  # type: ignore[no-untyped-call]  # torch has no type
        x, base_BH, weight_EDH, weights_BRK, rows, kind, packed
    )
    return mixed


def _check(
    x: Tensor, weight_EDH: Tensor, rows: Rows, *, packed: bool, base_BH: Tensor | None = None,
    weights_BRK: Tensor | None = None,
) -> None:  # fmt: skip
    """The loops read and write by addresses: another shape or type would have them go beyond an array."""
    _, D, H = weight_EDH.shape
    if D % 8 or H % 8:
        raise ValueError(f"weight: {list(weight_EDH.shape)}, expected [experts, input, output] of multiples of 8")
    B, P = len(rows.row_BU), len(rows.instance_P)
    for name, tensor, shape in (
        ("input", x, (P if packed else B, D)),
        ("weight", weight_EDH, (len(rows.ends_E), D, H)),
        ("base", base_BH, (B, H)),
    ):
        if tensor is not None and not (tensor.shape == shape and tensor.dtype == torch.float32 and tensor.is_cpu):
            given = f"{list(tensor.shape)} in {tensor.dtype} on {tensor.device.type}"
            raise ValueError(f"{name}: {given}, expected {list(shape)} in float32 on the CPU")
    if weights_BRK is not None:
        slots = B * rows.row_BU.shape[1] if rows.slot_BRK is None else rows.slot_BRK.numel()
        if weights_BRK.dim() != 3 or len(weights_BRK) != B or weights_BRK.numel() != slots or not weights_BRK.is_cpu:
            given = f"{list(weights_BRK.shape)} on {weights_BRK.device.type}"
            raise ValueError(f"routers' weights: {given}, expected {slots} of {B} instances on the CPU")


def _layer(
    x: Tensor, weight_EDH: Tensor, rows: Rows, kind: int, *, packed: bool, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """The output, and if ``keep`` what comes before norm and activation."""
    P, (_, D, H) = len(rows.instance_P), weight_EDH.shape
    out_PH, y_PH = x.new_empty(P, H), x.new_empty(P, H) if keep and kind != kernels.LINEAR else None
    _run_layer(x, None, weight_EDH, y_PH, out_PH, rows, kind, packed=packed, parts=_parts(P * D * H), sums=[0] * 7)
    return out_PH, y_PH


def _mixture(
    x: Tensor, base_BH: Tensor | None, weight_EDH: Tensor, weights_BRK: Tensor, rows: Rows, kind: int, *, packed: bool,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The weighted sums, and if ``keep`` what comes before norm and activation."""
    P, (_, D, H) = len(rows.instance_P), weight_EDH.shape
    parts = _parts(P * D * H)
    out_SBRH, y_PH = x.new_empty(parts, *weights_BRK.shape[:2], H), x.new_empty(P, H) if keep else None
    place, slot, weights = _addresses(rows.place_P, rows.slot_BRK, weights_BRK)
    sums = [place, *weights_BRK.shape, rows.row_BU.shape[1], slot, weights]
    _run_layer(x, base_BH, weight_EDH, y_PH, out_SBRH, rows, kind, packed=packed, parts=parts, sums=sums)
    return _together(out_SBRH), y_PH


def _run_layer(
    x: Tensor, base_BH: Tensor | None, weight_EDH: Tensor, y_PH: Tensor | None, out: Tensor, rows: Rows, kind: int, *,
    packed: bool, parts: int, sums: list[int],
) -> None:  # fmt: skip
    (E, D, H), P = weight_EDH.shape, len(rows.instance_P)
    x, base_BH, weight_EDH = _ready(x, packed=packed), _by_rows(base_BH), weight_EDH.contiguous()
    pointers = _addresses(rows.ends_E, rows.instance_P, x, weight_EDH, y_PH, out)
    base = (0, 0) if base_BH is None else (base_BH.data_ptr(), base_BH.stride(0))
    numbers = (E, D, H, P, kind, int(packed), x.stride(0), *pointers, _product(), *base, parts, *sums)
    team.run(kernels.layer(), numbers, parts)


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
        of_x, _, of_weight_EDH = _of_layer(
            ctx, x, weight_EDH, y_PH, gradients[0].contiguous(), [0] * 7,
            (ctx.needs_input_grad[0], False, ctx.needs_input_grad[1]),
        )  # fmt: skip
        return of_x, of_weight_EDH, None, None, None


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base_BH: Tensor | None, weight_EDH: Tensor, weights_BRK: Tensor, rows: Rows, kind: int,
        packed: bool,
    ) -> Tensor:  # fmt: skip
        x, weight_EDH, weights_BRK = _ready(x, packed=packed), weight_EDH.contiguous(), weights_BRK.float().contiguous()
        mixed_BRH, y_PH = _mixture(x, base_BH, weight_EDH, weights_BRK, rows, kind, packed=packed, keep=True)
        ctx.save_for_backward(x, weight_EDH, weights_BRK, y_PH)
        ctx.rows, ctx.kind, ctx.packed = rows, kind, packed
        return mixed_BRH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_EDH, weights_BRK, y_PH = ctx.saved_tensors
        rows: Rows = ctx.rows
        of_mixed_BRH, of_weights_BRK = gradients[0].contiguous(), torch.empty_like(weights_BRK)
        place, *others = _addresses(rows.place_P, rows.slot_BRK, weights_BRK, of_weights_BRK)
        sums = [place, *weights_BRK.shape[1:], rows.row_BU.shape[1], *others]
        of_x, of_base_BH, of_weight_EDH = _of_layer(
            ctx, x, weight_EDH, y_PH, of_mixed_BRH, sums, ctx.needs_input_grad[:3]
        )
        return of_x, of_base_BH, of_weight_EDH, of_weights_BRK, None, None, None


def _of_layer(
    ctx: Any, x: Tensor, weight_EDH: Tensor, y_PH: Tensor | None, of_out: Tensor, sums: list[int],
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, base and weight, if wanted; ``sums``: the loop's last arguments."""
    rows: Rows = ctx.rows
    (E, D, H), P, B = weight_EDH.shape, len(rows.instance_P), len(rows.row_BU)
    parts = _parts(2 * P * D * H)
    of_x = (x.new_empty(P, D) if ctx.packed else x.new_empty(parts, B, D)) if wanted[0] else None
    of_base_SBH = x.new_empty(parts, B, H) if wanted[1] else None
    of_weight_EDH = torch.empty_like(weight_EDH) if wanted[2] else None
    pointers = _addresses(rows.ends_E, rows.instance_P, x, of_out, weight_EDH, y_PH, of_x, of_weight_EDH)
    of_base = 0 if of_base_SBH is None else of_base_SBH.data_ptr()
    numbers = (E, D, H, P, ctx.kind, int(ctx.packed), x.stride(0), *pointers, _product(), of_base, parts, B, *sums)
    team.run(kernels.of_layer(), numbers, parts)
    if of_x is not None and not ctx.packed:
        of_x = _together(of_x)
    return of_x, None if of_base_SBH is None else _together(of_base_SBH), of_weight_EDH


def _together(of_parts: Tensor) -> Tensor:
    return of_parts[0] if len(of_parts) == 1 else of_parts.sum(dim=0)


def _ready(x: Tensor, *, packed: bool) -> Tensor:
    return x.contiguous() if packed else _by_rows(x)


def _by_rows(x: _Rows) -> _Rows:
    """The matrix, or a copy, whose rows are neighbouring numbers."""
    return x if x is None or x.stride(1) == 1 else x.contiguous()


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _product() -> int:
    return int(product_kernel().address)


def _parts(work: int) -> int:
    return torch.get_num_threads() if work >= _WORTH_A_TEAM else 1
