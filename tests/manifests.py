"""Manifests for tests to which most of their fields do not matter."""

from typing import Any

from msgspec.structs import replace

from feature_store.manifest import Chunk, Manifest


def make_manifest(version: int = 1, lineage: str = "a", **fields: Any) -> Manifest:
    """A full snapshot of one byte, with the given fields."""
    manifest = Manifest(
        lineage=lineage,
        version=version,
        parent=None,
        schema_hash="0" * 16,
        step=version,
        created_ms=0,
        published_ms=0,
        total_bytes=1,
        chunks=(Chunk(1, "0" * 64),),
        upload=f"{lineage}:{version}:0",
        event_time_ms=None,
        kind="full",
        precision="fp32",
        positions={},
        metrics={},
        feedback_arrivals=(),
        carried_from=(),
        held=None,
        signature=None,
    )
    return replace(manifest, **fields)
