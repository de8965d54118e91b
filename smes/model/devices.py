"""The training devices, CPU and CUDA; a mini-batch on its device; the memory that a process keeps.

On a GPU, copies run beside the computation: a batch that is sent while a step runs has arrived when the step ends.

Letters: B instances, W id columns, U distinct table rows of the batch, C columns of a table, F numeric features,
T tasks.
"""

import ctypes
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smes.arrays import F32, I64, Bool
from smes.derive import ModelInputs
from smes.events import WHOLE, ExampleBlock
from smes.joint_batch import JointBatch
from smes.model.config import RankerName
from smes.model.delayed_feedback import DelayedWeights
from smes.model.features import FeatureInputs, RequestInputs
from smes.model.id_rows import BatchRows
from smes.model.ids import pool_weights
from smes.model.request_split import RequestSplit, Side, Splits, first_of_requests
from smes.model.shards import Routes
from smes.model.table import Cells
from smes.rankers.ranker_input import RequestRows
from smes.schema import Schema
from smes.world import World


class Device(Protocol):
    """A training device: :class:`HostDevice` or :class:`CudaDevice`.

    Attributes:
        tells_at_once: Whether the host can read a result without waiting for other work.
    """

    device: torch.device
    tells_at_once: bool

    def host(self, array: NDArray[Any]) -> Tensor:
        """Make a tensor on the host that can be copied to the device without blocking."""
        ...

    def send(self, array: NDArray[Any]) -> Tensor:
        """Copy an array to the device. The copy may still be under way when this returns."""
        ...

    def ticket(self) -> object:
        """Mark the end of the copies that were started so far, for :meth:`receive`."""
        ...

    def receive(self, tensors: Iterable[Tensor], ticket: object) -> None:
        """Let the computation wait for copies, without blocking the host.

        Args:
            tensors: What :meth:`send` returned.
            ticket: Taken after they were sent.
        """
        ...

    def read_later(self, flag: Tensor) -> Callable[[], bool]:
        """Start to fetch a bool scalar. What is returned gives its value; it waits until the device has computed it."""
        ...

    def autocast(self) -> AbstractContextManager[object]:
        """A context that sets the precision of the dense part."""
        ...


class HostDevice:
    """The CPU. Tensors share memory with the arrays.

    Args:
        half: Whether autocast computes the dense part in bfloat16; else everything is float32.
    """

    device = torch.device("cpu")
    tells_at_once = True

    def __init__(self, *, half: bool = False) -> None:
        self._half = half

    def host(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.require(array, requirements=["C", "W"]))

    def send(self, array: NDArray[Any]) -> Tensor:
        return self.host(array)

    def ticket(self) -> object:
        return None

    def receive(self, tensors: Iterable[Tensor], ticket: object) -> None:
        pass

    def read_later(self, flag: Tensor) -> Callable[[], bool]:
        return lambda: bool(flag)

    def autocast(self) -> AbstractContextManager[object]:
        if self._half:
            return torch.autocast("cpu", torch.bfloat16)
        return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()


class CudaDevice:  # pragma: no cover - needs a GPU
    """A CUDA GPU. Copies from pinned memory run on a CUDA stream of their own.

    Weights are float32. Autocast computes the ranker and the heads in bfloat16, whose range needs no loss scaling.
    """

    tells_at_once = False

    def __init__(self, device: torch.device) -> None:
        self.device = device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
        self._copies = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]  # torch ships no type for it

    def host(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.require(array, requirements=["C", "W"])).pin_memory()

    def send(self, array: NDArray[Any]) -> Tensor:
        with torch.cuda.stream(self._copies):
            # Our reference to the pinned block may go: the caching host allocator keeps the block until the copy ran.
            return self.host(array).to(self.device, non_blocking=True)

    def ticket(self) -> object:
        return self._copies.record_event()

    def receive(self, tensors: Iterable[Tensor], ticket: object) -> None:
        compute = torch.cuda.current_stream(self.device)
        assert isinstance(ticket, torch.cuda.Event), "a ticket of this device"
        compute.wait_event(ticket)
        for tensor in tensors:
            # It was allocated on the copying stream, which must not reuse its memory while a step still reads it.
            tensor.record_stream(compute)

    def read_later(self, flag: Tensor) -> Callable[[], bool]:
        copy = torch.empty_like(flag, device="cpu", pin_memory=True).copy_(flag, non_blocking=True)
        arrived = torch.cuda.current_stream(self.device).record_event()

        def read() -> bool:
            arrived.synchronize()
            return bool(copy)

        return read

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast("cuda", dtype=torch.bfloat16)


def open_device(device: torch.device, *, half: bool = False, ranker: RankerName = "smes") -> Device:
    """Open the :class:`Device` for a torch device.

    Args:
        device: Which.
        half: Whether the CPU computes the dense part in bfloat16, as a GPU does in any case. Not that of ``smes``: its
            many small products would be slower.
        ranker: Of the dense part.

    Raises:
        ValueError: The device is neither cpu nor cuda, CUDA is not available, or the CPU multiplies no bfloat16.
    """
    if device.type == "cpu":
        if half:
            _check_half()
        return HostDevice(half=half and ranker != "smes")
    if device.type != "cuda":
        raise ValueError(f"device {str(device)!r}: expected cpu or cuda")
    if not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r}: this machine has no usable CUDA GPU")
    return CudaDevice(device)


def _check_half() -> None:
    """Without instructions for bfloat16, products in it take several times as long."""
    found = torch.cpu.get_capabilities()
    if not any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):
        raise ValueError("trainer.cpu_precision: 'bf16', expected fp32: this CPU has no instructions for bfloat16")


@dataclass(frozen=True, slots=True)
class SideColumns:
    """What one side of a split reads.

    Attributes:
        cells_BW: int64, for each id of the side the place of its row in the batch's rows.
        pool_BW: float32, weight of each id within its bag or sequence; None for a side without them.
        numerics_BF: float32, NaN where missing.
    """

    cells_BW: Tensor
    pool_BW: Tensor | None
    numerics_BF: Tensor

    def inputs(self, cells: Cells) -> FeatureInputs:
        """What the model reads of the side."""
        return FeatureInputs(cells.values.get("embedding"), cells.values.get("wide"), self.pool_BW, self.numerics_BF)


@dataclass(frozen=True, slots=True)
class RequestColumns:
    """A batch in two parts, on the CPU; see :class:`smes.model.features.RequestInputs`."""

    request: SideColumns
    item: SideColumns
    split: RequestSplit
    rows: RequestRows


@dataclass(frozen=True, slots=True)
class RankBatch:
    """The columns that one training step needs.

    Attributes:
        rows_U, cells_BW, keep_U, rate_U, routes: As in :class:`smes.model.id_rows.BatchRows`.
        pool_BW: float32, weight of each id within its bag or sequence; None for a schema without them, and in two
            parts.
        numerics_BF: float32, NaN where missing.
        numerics: The same on the host, of the rows that are the first of their impressions and have a weight.
        labels_BT: float32.
        mask_BT: bool, true where there is a label.
        weight_B: float32, sample weights; their sum is at most B.
        bucketed_BK: float32 on the host, of the same rows: the numbers whose quantiles bound buckets.
        late_share_BT: float32, as in :class:`smes.events.ExampleBlock`; None if every example is whole.
        ticket: Tells the device when the copies of these tensors have arrived.
        requests: The batch in two parts, where that pays.
        joint: The batches of all ranks, where there are several: this one may then be empty.
    """

    rows_U: Tensor
    cells_BW: Tensor
    keep_U: Tensor | None
    rate_U: Tensor | None
    pool_BW: Tensor | None
    numerics_BF: Tensor
    numerics: F32
    bucketed_BK: F32
    labels_BT: Tensor
    mask_BT: Tensor
    weight_B: Tensor
    late_share_BT: Tensor | None
    ticket: object
    requests: RequestColumns | None = None
    routes: Routes | None = None
    joint: JointBatch | None = None

    def __len__(self) -> int:
        """B."""
        return len(self.weight_B)

    def receive(self, device: Device) -> None:
        """Let the computation wait until this batch has arrived on the device that it was sent to."""
        columns = (self.rows_U, self.cells_BW, self.numerics_BF, self.labels_BT, self.mask_BT, self.weight_B)
        asked_A = None if self.routes is None else self.routes.asked_A
        optional = (self.keep_U, self.rate_U, self.pool_BW, self.late_share_BT, asked_A)
        device.receive([*columns, *(column for column in optional if column is not None)], self.ticket)

    def inputs(self, cells: Cells, of_requests: Cells | None = None) -> FeatureInputs | RequestInputs:
        """What the model reads.

        Args:
            cells: What the cells of this batch read from the table; of a batch in two parts, those of its items.
            of_requests: Those of its requests.
        """
        if self.requests is not None and of_requests is not None:
            request, item = self.requests.request.inputs(of_requests), self.requests.item.inputs(cells)
            return RequestInputs(request, item, self.requests.split, self.requests.rows)
        read = cells.values
        inputs = FeatureInputs(read.get("embedding"), read.get("wide"), self.pool_BW, self.numerics_BF)
        return inputs if len(self) else inputs.of_nothing()

    def or_nothing(self) -> "RankBatch":
        """The batch; of an empty one an instance without features, labels and weight, for what needs B ≥ 1."""
        if len(self):
            return self
        labels_BT = self.labels_BT.new_zeros(1, self.labels_BT.shape[1])
        return replace(
            self,
            labels_BT=labels_BT,
            mask_BT=torch.zeros_like(labels_BT, dtype=torch.bool),
            weight_B=self.weight_B.new_zeros(1),
            late_share_BT=None if self.late_share_BT is None else torch.zeros_like(labels_BT),
        )

    def delayed_weights(self, logits_BT: Tensor) -> DelayedWeights | None:
        """Weights of the labels where some feedback is still to come; None if every example is whole."""
        return None if self.late_share_BT is None else DelayedWeights.of(logits_BT, self.labels_BT, self.late_share_BT)


def send_batch(
    examples: ExampleBlock,
    read: ModelInputs,
    rows: BatchRows,
    schema: Schema,
    device: Device,
    splits: Splits | None = None,
    joint: JointBatch | None = None,
) -> RankBatch:
    """Send examples to a device.

    Args:
        examples: B examples.
        read: What the model reads of them.
        rows: The rows of the table that they read.
        schema: The schema of the examples.
        device: Where to.
        splits: Finds what the examples of a request share; None where it is not to be looked for.
        joint: The batches of all ranks; None where there is one rank.
    """
    send = device.send
    requests = None if splits is None or not len(examples) else _in_two_parts(examples, read, rows, splits)
    pool_BW, counts = None if requests else pool_weights(schema, read.ids), counted(examples)
    delayed = has_delayed(examples) if joint is None else joint.delayed
    weight_B = _bounded(examples.weight) if joint is None else _scaled(examples.weight, joint.factor)
    return RankBatch(
        rows_U=send(rows.rows_U),
        cells_BW=send(rows.cells_BW),
        keep_U=None if rows.keep_U is None else send(rows.keep_U),
        rate_U=None if rows.rate_U is None else send(rows.rate_U),
        routes=None if rows.routes is None else replace(rows.routes, asked_A=send(rows.routes.asked_A.numpy())),
        pool_BW=None if pool_BW is None else send(pool_BW),
        numerics_BF=send(read.numerics),
        numerics=np.ascontiguousarray(read.numerics if counts.all() else read.numerics[counts]),
        bucketed_BK=read.bucketed if counts.all() else read.bucketed[counts],
        labels_BT=send(examples.labels),
        mask_BT=send(examples.label_mask),
        weight_B=send(weight_B),
        late_share_BT=send(examples.late_share) if delayed else None,
        ticket=device.ticket(),  # last: it covers everything sent before it
        requests=requests,
        joint=joint,
    )


def joint_batch(examples: ExampleBlock, world: World) -> JointBatch:
    """What all ranks know of their batches, of which these examples are one. All ranks call it."""
    weight, observed = float(examples.weight.sum(dtype=np.float64)), int(counted(examples).sum())
    delayed = has_delayed(examples)
    return JointBatch.of(world, instances=len(examples), observed=observed, weight=weight, delayed=delayed)


def counted(examples: ExampleBlock) -> Bool:
    """Which examples count for running moments of features: the first of each impression, if they have a weight."""
    counts: Bool = examples.begins & (examples.weight != 0)
    return counts


def has_delayed(examples: ExampleBlock) -> bool:
    """Whether some feedback is still to come for one of them."""
    return not bool((examples.kind == WHOLE).all())


def _in_two_parts(examples: ExampleBlock, read: ModelInputs, rows: BatchRows, splits: Splits) -> RequestColumns | None:
    """What neighbouring examples of a request share, and the rest; None where that does not pay."""
    starts_R = first_of_requests(examples.request_id, examples.user_id)
    split = splits.of(read, starts_R)
    if split is None:
        return None

    def side(side: Side, rows_N: I64 | slice) -> SideColumns:
        ids = read.ids[rows_N].take(side.id_columns_W, axis=1)
        pools = pool_weights(splits.schema, ids, side.features)
        return SideColumns(
            cells_BW=torch.from_numpy(rows.cells_BW[rows_N].take(side.id_columns_W, axis=1)),
            pool_BW=None if pools is None else torch.from_numpy(pools),
            numerics_BF=torch.from_numpy(read.numerics[rows_N].take(side.numerics_F, axis=1)),
        )

    request_rows = RequestRows(torch.from_numpy(starts_R), len(examples))
    return RequestColumns(side(split.request, starts_R), side(split.item, slice(None)), split, request_rows)


def _bounded(weight_B: F32) -> F32:
    """Scale sample weights so that they sum to at most B: no example counts for more than its batch."""
    total = float(weight_B.sum(dtype=np.float64))
    if total <= len(weight_B):
        return weight_B
    return _scaled(weight_B, len(weight_B) / total)


def _scaled(weight_B: F32, factor: float) -> F32:
    with np.errstate(invalid="ignore"):  # an infinity becomes NaN, and the step is not taken
        scaled: F32 = weight_B * np.float32(factor)
    return scaled


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT = 32 << 20  # Tables and snapshots are larger. They still go back to the system.
_MOST_KEPT = 1 << 30


def keep_freed_memory() -> bool:
    """Let this process keep freed blocks of up to 32 MiB, 1 GiB in total. May be called more than once.

    Returns:
        Whether the setting was made. It exists in glibc only; nothing changes with another C library.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # another C library may not have it
    return mallopt is not None and all(
        mallopt(option, size) == 1
        for option, size in ((_M_MMAP_THRESHOLD, _LARGEST_KEPT), (_M_TRIM_THRESHOLD, _MOST_KEPT))
    )
