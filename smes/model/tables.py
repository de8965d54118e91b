"""Opens a table on a device."""

from collections.abc import Sequence

import torch

from smes.model.table import RecordTable
from smes.model.table_cuda import DeviceTable
from smes.model.table_host import HostTable
from smes.model.table_layout import ColumnGroup


def open_table(groups: Sequence[ColumnGroup], device: torch.device) -> RecordTable:
    """Make an empty table on a device.

    Args:
        groups: The groups of columns of a record, at least one.
        device: ``cpu`` or ``cuda``.
    """
    return HostTable(groups) if device.type == "cpu" else DeviceTable(groups, device)
