"""How much memory the parts of a learner take, by their shapes alone."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from smes.model.id_table import IdTable

_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes. Frozen copies, activations and what torch holds beside them are not in it.

    Attributes:
        table: Weights of the id table's rows, free rows included.
        ids: Which row each id has.
        dense: The other weights.
        optimizer: What the optimisers keep of both.
    """

    table: int
    ids: int
    dense: int
    optimizer: int


def memory_use(table: IdTable, dense: Iterable[Tensor], moments: Iterable[Tensor]) -> MemoryUse:
    """The bytes of these parts.

    Args:
        table: The id table.
        dense: The other weights.
        moments: What their optimiser keeps.
    """
    layout, rows = table.records.layout, table.records.num_rows
    weights = rows * layout.num_weights * _FLOAT_BYTES
    accumulators = rows * (layout.width - layout.num_weights) * _FLOAT_BYTES
    return MemoryUse(
        table=weights,
        ids=table.rows.nbytes,
        dense=sum(tensor.nbytes for tensor in dense),
        optimizer=accumulators + sum(tensor.nbytes for tensor in moments),
    )
