"""One event of a record of many, as a record of its own."""

from stream.codec.encoders import single_row
from stream.codec.json_requests import single_impression
from stream.log.event_log import Record


def single_event(record: Record, row: int) -> bytes:
    """The value of a record with one event of another one's, in the same wire form.

    Raises:
        ValueError: The record does not have the event, or cannot be read.
    """
    is_arrow = dict(record.headers).get("codec") == b"arrow"
    return single_row(record.value, row) if is_arrow else single_impression(record.value, row)
