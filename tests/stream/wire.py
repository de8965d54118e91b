"""Records of the Arrow wire form out of any columns, and what two decoders must agree on."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from smes.schema import Schema
from stream.codec import codec
from stream.codec.codec import Decoded
from stream.log.event_log import Record

ARRIVAL_MS = 1_700_000_000_000
MakeRecord = Callable[..., Record]


def decode(records: Sequence[Record], schema: Schema, *, max_future_ms: int = 300_000) -> Decoded:
    """Decodes for a reader whose clock stands at ``ARRIVAL_MS``."""
    return codec.decode(records, schema, max_future_ms=max_future_ms, now_ms=ARRIVAL_MS)


def ipc(columns: dict[str, Any], *, batch_rows: int = 1000, **options: Any) -> bytes:
    """An IPC stream of the columns."""
    table = pa.table(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=batch_rows)
    encoded: bytes = sink.getvalue().to_pybytes()
    return encoded


def assert_same_events(got: Any, expected: Any) -> None:
    """Equal but for where they were read from."""
    for name, column in expected.arrays().items():
        if name not in ("partition", "offset", "arrival_ms"):
            np.testing.assert_array_equal(got.arrays()[name], column, err_msg=name)
