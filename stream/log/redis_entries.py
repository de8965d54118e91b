"""Entries of a Redis stream: the fields of records, ours and those of other programs, and entries that are none.

======= ========================================================================================================
``v``   the value; all that a record must have
``h``   the headers, as MessagePack: an array of [name, bytes] pairs. Our own entries have it
``t``   when it was sent, Unix milliseconds. Without it, the milliseconds of an id that Redis chose (``XADD *``)
others  instead of ``h``: each field is a header of that name, such as ``codec`` and ``schema``
======= ========================================================================================================
"""

from collections.abc import Mapping
from functools import lru_cache

import msgspec

from stream.log.event_log import Headers, Record, TopicPartition, UnreadableRecord

Entry = tuple[bytes, dict[bytes, bytes]]
"""An entry as the client returns it: its id and its fields."""

VALUE, HEADERS, ARRIVAL = b"v", b"h", b"t"

_OWN = {VALUE, HEADERS, ARRIVAL}
_DECODER = msgspec.msgpack.Decoder(tuple[tuple[str, bytes], ...])


def record_of(
    at: TopicPartition, offset: int, entry_id: bytes, fields: Mapping[bytes, bytes], now_ms: int
) -> Record | UnreadableRecord:
    """The record that an entry holds, or what to report of an entry that holds none.

    Args:
        at, offset: Where it is.
        entry_id, fields: As Redis returned them.
        now_ms: The arrival time of a record that has none.
    """
    try:
        value, headers = fields[VALUE], _headers(fields)
        arrival_ms = int(fields[ARRIVAL]) if ARRIVAL in fields else int(entry_id.partition(b"-")[0])
    except KeyError:
        names = ", ".join(sorted(_text(name) for name in fields))
        reason = f"fields {names}, expected v of a record of the event log"
    except ValueError as error:
        reason = f"expected headers and an arrival time of the event log: {error}"
    else:
        return Record(at.topic, at.partition, offset, value, headers, arrival_ms if arrival_ms > 0 else now_ms)
    return UnreadableRecord(at.topic, at.partition, offset, f"entry {entry_id.decode()}", reason, _as_json(fields))


def _headers(fields: Mapping[bytes, bytes]) -> Headers:
    if HEADERS in fields:
        return unpack_headers(fields[HEADERS])
    return tuple((name.decode(), value) for name, value in fields.items() if name not in _OWN)


def _as_json(fields: Mapping[bytes, bytes]) -> bytes:
    return msgspec.json.encode({_text(name): _text(value) for name, value in fields.items()})


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


# Cached, because every record has headers and few of them differ.
@lru_cache(maxsize=256)
def pack_headers(headers: Headers) -> bytes:
    """Headers as the field ``h`` holds them: MessagePack, an array of [name, bytes] pairs."""
    return msgspec.msgpack.encode(headers)


@lru_cache(maxsize=256)
def unpack_headers(data: bytes) -> Headers:
    """The inverse of :func:`pack_headers`.

    Raises:
        ValueError: The bytes are not packed headers.
    """
    try:
        return _DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"headers of {len(data)} bytes: expected MessagePack [[name, bytes], …]: {error}") from error
