"""Small logs that tests make: files, a schema, and what the reader makes of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from simulators.logs.ledger import LogLedger
from simulators.logs.reader import LogBlock, LogReader, open_log
from smes_io.schema_file import load_schema_file

COLUMNS = "user_id: user, item_id: item, event_time: ts, time_unit: s"
CLICK = "tasks: [{name: click, window_s: 5}]"


def schema_text(*, log: str = "", features: str = "", labels: str = "click: click", tasks: str = CLICK) -> str:
    """A schema file of a log with the columns user, item, ts and click."""
    wanted = f"features: [{features}]\n" if features else ""
    return f"name: t\n{tasks}\n{wanted}log: {{{COLUMNS}, labels: {{{labels}}}{', ' + log if log else ''}}}\n"


def opened(path: Path, *, max_rejected: float = 1.0, **schema: str) -> LogReader:
    """Open a log under :func:`schema_text`, which is written beside it."""
    where = (path if path.is_dir() else path.parent) / "schema.yaml"
    where.write_text(schema_text(**schema), encoding="utf-8")
    return open_log(path, load_schema_file(where), threads=1, max_rejected=max_rejected)


def read(path: Path, **schema: str) -> LogBlock:
    """All impressions of a log of one block."""
    with opened(path, max_rejected=1.0, **schema) as reader:
        (block,) = reader.blocks(1 << 20)
        return block


def ledger(path: Path, **schema: str) -> LogLedger:
    """The ledger of a log."""
    with opened(path, max_rejected=1.0, **schema) as reader:
        return reader.ledger


def csv_log(path: Path, rows: Sequence[str], header: str = "user,item,ts,click") -> Path:
    """Write a text file of the log's columns."""
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def parquet_log(path: Path, columns: Mapping[str, Any], **options: Any) -> Path:
    """Write a Parquet file; user, item, ts and click are made up where they are not given."""
    n = len(next(iter(columns.values())))
    made = {
        "user": np.arange(n),
        "item": np.ones(n, np.int64),
        "ts": 1_600_000_000 + np.arange(n),
        "click": np.arange(n) % 2,
    }
    pq.write_table(pa.table({**made, **columns}), path, **options)
    return path
