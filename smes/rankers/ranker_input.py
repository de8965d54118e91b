"""What a ranker reads of instances that belong to requests: what is equal within a request once per request.

Letters: N instances, R requests, M most instances of a request, I input width, J and K its columns that belong to
requests and to instances, O output width.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from smes.rankers.split_kernels import sum_runs

_T = TypeVar("_T")

_MOST_PADDING = 4  # times the rows; from there on products read a copy per instance

Kept = dict[tuple[int, str], tuple[Any, Any]]
"""What depends on weights that never change: (owner's id, name) → (the owner, so that its id stays its own; value)."""


class RequestRows:
    """Which instances each request has.

    Args:
        starts_R: int64 on the CPU, the first instance of each request, from 0 up; none is empty.
        instances: N.
    """

    def __init__(self, starts_R: Tensor, instances: int) -> None:
        self.instances, self.requests = instances, len(starts_R)
        self._starts_R = starts_R

    @cached_property
    def counts_R(self) -> Tensor:
        """int64, how many instances each request has."""
        return torch.diff(self._starts_R, append=torch.tensor([self.instances]))

    @cached_property
    def _most(self) -> int:
        return int(self.counts_R.max())

    @cached_property
    def request_N(self) -> Tensor:
        """int64, the request of each instance."""
        return torch.repeat_interleave(torch.arange(self.requests), self.counts_R)

    def spread(self, x_RC: Tensor) -> Tensor:
        """What is known of requests, for their instances: [R, ·] → [N, ·]."""
        if self.requests == 1:
            return x_RC.expand(self.instances, *x_RC.shape[1:])
        if x_RC.requires_grad and x_RC.dim() == 2 and x_RC.dtype == torch.float32:
            spread: Tensor = _Spread.apply(x_RC, self)  # type: ignore[no-untyped-call]  # torch
            return spread
        return x_RC.index_select(0, self.request_N)

    def summed(self, x_NC: Tensor) -> Tensor:
        """The sum over the instances of each request. float32 [N, C] → [R, C]."""
        out_RC = x_NC.new_empty(self.requests, x_NC.shape[1])
        sum_runs(x_NC.detach().contiguous().numpy(), self._starts_R.numpy(), out_RC.numpy())
        return out_RC

    def product(self, x_NA: Tensor, y_RAC: Tensor, z_RC: Tensor | None = None) -> Tensor:
        """``x_n y_r + z_r`` for each instance n of each request r. [N, A], [R, A, C], [R, C] → [N, C]."""
        if self.requests == 1:
            return x_NA @ y_RAC[0] if z_RC is None else torch.addmm(z_RC[0], x_NA, y_RAC[0])
        R, M, A = self.requests, self._most, x_NA.shape[1]
        if self.instances == R * M:
            return _products(x_NA.view(R, M, A), y_RAC, z_RC).view(self.instances, -1)
        if _MOST_PADDING * self.instances < R * M:
            z_NC = None if z_RC is None else z_RC.index_select(0, self.request_N)
            return _products(x_NA.unsqueeze(1), y_RAC.index_select(0, self.request_N), z_NC).squeeze(1)
        padded = x_NA.new_zeros(R * M, A).index_copy(0, self._place_N, x_NA).view(R, M, A)
        return _products(padded, y_RAC, z_RC).flatten(0, 1).index_select(0, self._place_N)

    @cached_property
    def _place_N(self) -> Tensor:
        return self.request_N * self._most + torch.arange(self.instances) - self._starts_R[self.request_N]


def _products(x_RMA: Tensor, y_RAC: Tensor, z_RC: Tensor | None) -> Tensor:
    return torch.bmm(x_RMA, y_RAC) if z_RC is None else torch.baddbmm(z_RC.unsqueeze(1), x_RMA, y_RAC)


class _Spread(torch.autograd.Function):
    """:meth:`RequestRows.spread` with a gradient that is summed run by run."""

    @staticmethod
    def forward(ctx: Any, x_RC: Tensor, rows: RequestRows) -> Tensor:
        ctx.rows = rows
        return x_RC.index_select(0, rows.request_N)

    @staticmethod
    def backward(ctx: Any, of_spread_NC: Tensor) -> tuple[Tensor, None]:
        return ctx.rows.summed(of_spread_NC), None


class SplitInput:
    """A ranker's input in two parts; as a matrix it has the rows [N, I] of :meth:`whole`.

    Args:
        request_RJ, item_NK: The parts.
        columns_J, columns_K: int64, where their columns are in the whole.
        rows: Which instances each request has.
        kept: For what depends on weights alone; None where weights change.
    """

    def __init__(
        self,
        request_RJ: Tensor,
        item_NK: Tensor,
        columns_J: Tensor,
        columns_K: Tensor,
        rows: RequestRows,
        kept: Kept | None = None,
    ) -> None:
        self.request_RJ, self.item_NK = request_RJ, item_NK
        self.columns_J, self.columns_K = columns_J, columns_K
        self.rows, self._kept = rows, kept
        self._whole: Tensor | None = None

    def __len__(self) -> int:
        """N."""
        return len(self.item_NK)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.item_NK.device

    @property
    def dtype(self) -> torch.dtype:
        """Of both parts."""
        return self.item_NK.dtype

    def whole(self) -> Tensor:
        """Each instance with all its columns. [N, I]."""
        if self._whole is None:
            both = torch.cat([self.rows.spread(self.request_RJ), self.item_NK], dim=1)
            self._whole = both.index_select(1, torch.cat([self.columns_J, self.columns_K]).argsort())
        return self._whole

    def sliced(self, owner: object, make: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, Tensor], ...]:
        """The columns of tensors […, I] that belong to either part.

        Args:
            owner: What they depend on.
            make: Makes the tensors.
        """

        def both() -> tuple[tuple[Tensor, Tensor], ...]:
            return tuple((t.index_select(-1, self.columns_J), t.index_select(-1, self.columns_K)) for t in make())

        columns: tuple[tuple[Tensor, Tensor], ...] = self.kept(owner, "columns", both)
        return columns

    def kept(self, owner: object, name: str, make: Callable[[], _T]) -> _T:
        """What ``make`` gives; the same as the last time where weights never change."""
        return keep(self._kept, owner, name, make)

    def linear(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """``F.linear`` of the whole, with one product per part. [N, O]."""
        ((weight_OJ, weight_OK),) = self.sliced(weight_OI, lambda: (weight_OI,))
        return self.added(F.linear(self.request_RJ, weight_OJ, bias_O), F.linear(self.item_NK, weight_OK))

    def added(self, of_request_RO: Tensor, of_item_NO: Tensor) -> Tensor:
        """The sum of what both parts give. [N, O]."""
        return of_item_NO + self.rows.spread(of_request_RO)

    def mapped(self, request_RJ: Tensor, item_NK: Tensor) -> "SplitInput":
        """The same split of what was computed column by column of this one."""
        return SplitInput(request_RJ, item_NK, self.columns_J, self.columns_K, self.rows, self._kept)


RankerInput = Tensor | SplitInput
"""[B, I] as a matrix or in two parts."""


def whole(x: RankerInput) -> Tensor:
    """As a matrix."""
    return x.whole() if isinstance(x, SplitInput) else x


def keep(kept: Kept | None, owner: object, name: str, make: Callable[[], _T]) -> _T:
    """What ``make`` gives; the same as the last time if it is kept."""
    if kept is None:
        return make()
    found: tuple[object, _T] | None = kept.get((id(owner), name))
    if found is None:
        found = kept[id(owner), name] = (owner, make())
    return found[1]
