"""How many impressions one record may hold."""

from smes.events import ImpressionBlock
from smes.schema import Schema

MAX_ROWS = 65_536
"""Most events of one record: a column that is absent costs no bytes on the wire, but its full width in memory."""

_MAX_BLOCK_BYTES = 128 * 1024 * 1024  # that one record's impressions take as a block


def max_rows(schema: Schema) -> int:
    """Most impressions of one record: so many that their block stays small, whatever the record's own size."""
    row_bytes = sum(column.nbytes for column in ImpressionBlock.empty(schema, 1).arrays().values())
    return max(1, min(MAX_ROWS, _MAX_BLOCK_BYTES // row_bytes))
