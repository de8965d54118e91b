"""The payloads on a way to a version, read one after the other and checked against their manifests."""

import threading
from collections.abc import Iterator

from feature_store.manifest import Manifest
from feature_store.payload import PayloadContent, read_payload
from feature_store.snapshots import SnapshotStore
from smes.errors import SchemaMismatch, SnapshotError
from smes.schema import Schema


class LoadStopped(Exception):
    """Reading ended because the service stops. Nothing is wrong with what was read."""


class Payloads:
    """The payloads of a way, each opened when the one before was read.

    Reading raises what the store raises; SnapshotError or SchemaMismatch where a payload is not what its manifest says;
    and LoadStopped.

    Args:
        store: Gives their bytes.
        schema: The configured schema.
        way: Manifests of the payloads, in order.
        stopping: Set when nobody waits for the rest any more.

    Attributes:
        at: The manifest of the payload that was opened last.
        store_error: What the store raised, whose bytes are not verified.
    """

    def __init__(
        self, store: SnapshotStore, schema: Schema, way: tuple[Manifest, ...], stopping: threading.Event
    ) -> None:
        self._store = store
        self._schema = schema
        self._way = way
        self._stopping = stopping
        self.at = way[0]
        self.store_error: Exception | None = None

    def __iter__(self) -> Iterator[PayloadContent]:
        for manifest in self._way:
            self.at = manifest
            name = f"snapshot {manifest.lineage}:{manifest.version}"
            if manifest.schema_hash != self._schema.hash:
                raise SchemaMismatch(name, expected=self._schema.hash, got=manifest.schema_hash)
            payload = read_payload(self._pieces(manifest), manifest.total_bytes)
            if (payload.lineage, payload.version, payload.kind) != (manifest.lineage, manifest.version, manifest.kind):
                raise SnapshotError(f"{name}: its payload says {payload.lineage}:{payload.version}, {payload.kind}")
            yield payload

    def _pieces(self, manifest: Manifest) -> Iterator[bytes]:
        try:
            for piece in self._store.pieces(manifest):
                if self._stopping.is_set():
                    raise LoadStopped
                yield piece
        except LoadStopped:
            raise
        except Exception as error:
            self.store_error = error
            raise
