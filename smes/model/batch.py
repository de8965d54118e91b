"""A mini-batch on the training device.

Letters: B instances, W id columns, U distinct table rows of the batch, C columns of a table, F numeric features,
T tasks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from smes.arrays import I64
from smes.events import ExampleBlock
from smes.model.devices import Device
from smes.model.features import FeatureInputs
from smes.model.ids import pool_weights, readers
from smes.model.table import Readers, read_cells
from smes.schema import Schema


@dataclass(frozen=True, slots=True)
class RankBatch:
    """The columns that one training step needs.

    Attributes:
        rows_U: int64, the distinct table rows of the batch.
        cells_BW: int64, for each id the place of its row in ``rows_U``.
        readers: For each row in ``rows_U`` the cells that read it; None on a GPU.
        pool_BW: float32, weight of each id within its bag or sequence; None for a schema without them.
        numerics_BF: float32, NaN where missing.
        labels_BT: float32.
        mask_BT: bool, true where there is a label.
        weight_B: float32, sample weights.
        ticket: Tells the device when the copies of these tensors have arrived.
    """

    rows_U: Tensor
    cells_BW: Tensor
    readers: Readers | None
    pool_BW: Tensor | None
    numerics_BF: Tensor
    labels_BT: Tensor
    mask_BT: Tensor
    weight_B: Tensor
    ticket: object

    def __len__(self) -> int:
        """B."""
        return len(self.weight_B)

    def receive(self, device: Device) -> None:
        """Let the computation wait until this batch has arrived on the device that it was sent to."""
        columns = (self.rows_U, self.cells_BW, self.numerics_BF, self.labels_BT, self.mask_BT, self.weight_B)
        device.receive([*columns] if self.pool_BW is None else [*columns, self.pool_BW], self.ticket)

    def inputs(self, leaves: Mapping[str, Tensor]) -> FeatureInputs:
        """What the model reads.

        Args:
            leaves: Table name → float32 [U, C], the table's rows ``rows_U``.
        """
        cells = {name: read_cells(leaf_UC, self.cells_BW, self.readers) for name, leaf_UC in leaves.items()}
        return FeatureInputs(cells.get("embedding"), cells.get("wide"), self.pool_BW, self.numerics_BF)


def send_batch(examples: ExampleBlock, rows_U: I64, cells_BW: I64, schema: Schema, device: Device) -> RankBatch:
    """Send examples to a device.

    Args:
        examples: B ≥ 1 examples.
        rows_U: Their distinct table rows.
        cells_BW: For each id the place of its row in ``rows_U``.
        schema: The schema of the examples.
        device: Where to.
    """
    send = device.send
    pool_BW = pool_weights(schema, examples.ids)
    return RankBatch(
        rows_U=send(rows_U),
        cells_BW=send(cells_BW),
        readers=_readers(cells_BW, len(rows_U), device),
        pool_BW=None if pool_BW is None else send(pool_BW),
        numerics_BF=send(examples.numerics),
        labels_BT=send(examples.labels),
        mask_BT=send(examples.label_mask),
        weight_B=send(examples.weight),
        ticket=device.ticket(),  # last: it covers everything sent before it
    )


def _readers(cells_BW: I64, num_rows: int, device: Device) -> Readers | None:
    if device.device.type != "cpu":
        return None
    order, start_U = readers(cells_BW, num_rows)
    return Readers(device.send(order), device.send(start_U))
