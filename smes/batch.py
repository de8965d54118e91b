"""A mini-batch on the training device.

Letters: B instances, W id columns, U distinct rows of the table, F numeric features, T tasks.
"""

from dataclasses import dataclass

from torch import Tensor

from smes.embedding import Readers
from smes.events import I64


@dataclass(frozen=True, slots=True)
class RankBatch:
    """What one step needs, columnar.

    Attributes:
        rows_U: int64, the distinct table rows of the batch.
        cells_BW: int64, which of them each id column reads.
        readers: The same the other way round; None on a GPU.
        pool_BW: float32, weight of each id within its bag; None for a schema without bags.
        numerics_BF: float32, NaN where missing.
        labels_BT: float32.
        mask_BT: bool, true where there is a label.
        weight_B: float32, sample weights.
        user_id: int64 [B], on the host: for the metrics.
        event_time_ms: int64 [B], on the host.
        ticket: What :meth:`smes.devices.Device.receive` needs to hand the tensors to the computing stream.
    """

    rows_U: Tensor
    cells_BW: Tensor
    readers: Readers | None
    pool_BW: Tensor | None
    numerics_BF: Tensor
    labels_BT: Tensor
    mask_BT: Tensor
    weight_B: Tensor
    user_id: I64
    event_time_ms: I64
    ticket: object = None

    def __len__(self) -> int:
        return len(self.user_id)

    def tensors(self) -> list[Tensor]:
        """Those that live on the device."""
        columns = (self.rows_U, self.cells_BW, self.numerics_BF, self.labels_BT, self.mask_BT, self.weight_B)
        return [*columns] if self.pool_BW is None else [*columns, self.pool_BW]
