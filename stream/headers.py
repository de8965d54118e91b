"""Record headers as compact bytes, for logs that have no headers of their own.

Per header: name length (uint8), name (UTF-8), value length (uint32, little-endian), value. No headers: no bytes.
"""

import struct
from functools import lru_cache

from stream.log import Headers

_LENGTH = struct.Struct("<I")


# Headers name codec and schema: a run has a handful of different ones, and packs one of them for every record.
@lru_cache(maxsize=256)
def pack_headers(headers: Headers) -> bytes:
    """Headers to bytes.

    Raises:
        ValueError: A name is longer than 255 bytes.
    """
    parts = []
    for name, value in headers:
        encoded = name.encode()
        if len(encoded) > 255:
            raise ValueError(f"header {name[:40]!r}…: name of {len(encoded)} bytes, expected at most 255")
        parts += [bytes((len(encoded),)), encoded, _LENGTH.pack(len(value)), value]
    return b"".join(parts)


@lru_cache(maxsize=256)
def unpack_headers(data: bytes) -> Headers:
    """The inverse of :func:`pack_headers`.

    Raises:
        ValueError: The bytes are no headers.
    """
    headers, at = [], 0
    while at < len(data):
        name_end = at + 1 + data[at]
        value_start = name_end + _LENGTH.size
        if value_start > len(data):
            raise ValueError(f"headers of {len(data)} bytes end inside a name, at byte {at}")
        value_end = value_start + _LENGTH.unpack_from(data, name_end)[0]
        if value_end > len(data):
            raise ValueError(f"headers of {len(data)} bytes end inside a value, at byte {value_start}")
        headers.append((data[at + 1 : name_end].decode(), data[value_start:value_end]))
        at = value_end
    return tuple(headers)
