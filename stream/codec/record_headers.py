"""A record's codec and the headers that name it; :mod:`stream.codec.codec` says what they mean."""

from typing import Literal

from smes.schema import Schema
from stream.log.event_log import Headers

Codec = Literal["json", "arrow"]

MAX_BYTES: dict[Codec, int] = {"json": 1024 * 1024, "arrow": 64 * 1024 * 1024}
"""Largest record: an event, or those of a request, in JSON, which takes many times its size as Python objects; many
events in Arrow."""


def headers(codec: Codec, schema: Schema) -> Headers:
    """The headers of a record in this codec and schema."""
    return (("codec", codec.encode()), ("schema", schema.hash.encode()))
