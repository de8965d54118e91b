"""The manifest: what a published snapshot is, and how to verify its bytes (:mod:`feature_store.payload`)."""

import json
import math
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta

from smes.errors import SnapshotError

LARGEST_INTEGER = 2**53 - 1
"""JSON readers and Lua keep integers exactly up to here."""

Count = Annotated[int, Meta(ge=0, le=LARGEST_INTEGER)]
Text = Annotated[str, Meta(min_length=1)]


class Chunk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One piece of a payload: its length and the SHA-256 of its bytes in lower-case hex."""

    bytes: Count
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a published snapshot is and how to verify it. In JSON, every field is present.

    Attributes:
        lineage: One uninterrupted history of weights.
        version: Number of the step after which the weights were cut, growing within a lineage.
        parent: The version published before it in the lineage, None for the first.
        schema_hash: :attr:`smes.schema.Schema.hash` of the schema it was trained with.
        step: Optimiser steps behind the weights.
        created_ms: Wall time of the cut, Unix milliseconds.
        total_bytes: Length of the payload, the sum of the chunks.
        chunks: The pieces in order.
        upload: Names the upload that wrote these chunks, so that the uploads of two writers never mix.
        event_time_ms: Event time reached, Unix milliseconds; None before the first example.
        kind: ``full``: the payload holds every weight.
        positions: Topic → partition (decimal digits) → next record to read, at the moment of the cut.
        metrics: What the trainer measured: plain JSON values (NaN becomes null).
        feedback_arrivals: (arrival at the log in Unix milliseconds, number of events) of the feedback trained since
            the parent. The scorer computes freshness from it.
    """

    lineage: Text
    version: Count
    parent: Count | None
    schema_hash: Text
    step: Count
    created_ms: Count
    total_bytes: Count
    chunks: Annotated[tuple[Chunk, ...], Meta(min_length=1)]
    upload: Text
    event_time_ms: Count | None
    kind: Literal["full"]
    positions: dict[str, dict[str, Count]]
    metrics: dict[str, Any]
    feedback_arrivals: tuple[tuple[Count, Count], ...]

    def to_json(self) -> bytes:
        """Compact JSON from which :meth:`from_json` builds an equal manifest (NaN metrics come back as None)."""
        # Not msgspec's encoder: it writes floats and non-ASCII text in another way.
        return json.dumps(_plain(self), separators=(",", ":"), allow_nan=False).encode()

    @classmethod
    def from_json(cls, text: bytes | str) -> "Manifest":
        """Read a manifest strictly: every field is present and of its type, and there is no other field.

        Raises:
            SnapshotError: The message names the field and what was expected.
        """
        try:
            manifest = _DECODER.decode(text)
        except msgspec.ValidationError as error:
            raise SnapshotError(f"snapshot manifest: {_by_field(str(error))}") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise SnapshotError(f"snapshot manifest: expected JSON: {error}") from error
        total_bytes = sum(chunk.bytes for chunk in manifest.chunks)
        if manifest.total_bytes != total_bytes:
            raise SnapshotError(
                f"snapshot manifest: total_bytes: expected the sum of the chunks, {total_bytes}, "
                f"got {manifest.total_bytes}"
            )
        return manifest


_DECODER = msgspec.json.Decoder(Manifest)


def _by_field(message: str) -> str:
    """msgspec's message with the field first: ``Expected `int`, got `str` - at `$.step``` → ``step: expected …``."""
    what, _, path = message.partition(" - at `")
    what = what[:1].lower() + what[1:]
    field = path.rstrip("`").removeprefix("$").removeprefix(".")
    return f"{field}: {what}" if field else what


def _plain(value: Any) -> Any:
    """The value as JSON has it: undefined figures (an AUC without positives) are null, NumPy scalars are Python's."""
    if isinstance(value, msgspec.Struct):
        value = msgspec.structs.asdict(value)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
