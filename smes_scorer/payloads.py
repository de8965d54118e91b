"""The payloads on a way to a version, read one after the other and checked against their manifests."""

import json
import threading
from collections.abc import Iterator, Mapping

from feature_store.manifest import Manifest
from feature_store.payload import PayloadContent
from feature_store.payload_parts import read_published
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
        known: The schemas that were taken already, by hash.
        served: Hash of the schema in service; before the first, of the configured one. A version that was carried over
            from it brings its own.
        way: Manifests of the payloads, in order.
        stopping: Set when nobody waits for the rest any more.

    Attributes:
        at: The manifest of the payload that was opened last.
        store_error: What the store raised, whose bytes are not verified.
        renamed: Feature → its name before, as a payload says whose schema was not known.
    """

    def __init__(
        self,
        store: SnapshotStore,
        known: Mapping[str, Schema],
        served: str,
        way: tuple[Manifest, ...],
        stopping: threading.Event,
    ) -> None:
        self._store = store
        self._known, self._served = known, served
        self._first: PayloadContent | None = None
        self._way = way
        self._stopping = stopping
        self.at = way[0]
        self.store_error: Exception | None = None
        self.renamed: dict[str, str] = {}

    def schema(self) -> Schema:
        """The schema of the version that the way leads to. One that is not known is read from the first payload.

        Raises:
            SchemaMismatch: It is another one than that in service, and was not carried over from it.
            SnapshotError: The payload has another schema than its manifest says.
        """
        last = self.at = self._way[-1]
        if (known := self._known.get(last.schema_hash)) is not None:
            return known
        if self._served not in last.carried_from:
            raise SchemaMismatch(_name(last), expected=self._served, got=last.schema_hash)
        self._first = self._opened(self._way[0])
        schema, self.renamed = _schema_of(self._first, last)
        return schema

    def __iter__(self) -> Iterator[PayloadContent]:
        for manifest in self._way:
            if manifest.schema_hash != self._way[-1].schema_hash:
                self.at = manifest
                raise SchemaMismatch(_name(manifest), expected=self._way[-1].schema_hash, got=manifest.schema_hash)
            first, self._first = self._first, None
            yield first or self._opened(manifest)

    def _opened(self, manifest: Manifest) -> PayloadContent:
        self.at = manifest
        payload = read_published(self._pieces(manifest), manifest)
        if (payload.lineage, payload.version, payload.kind) != (manifest.lineage, manifest.version, manifest.kind):
            name = _name(manifest)
            raise SnapshotError(f"{name}: its payload says {payload.lineage}:{payload.version}, {payload.kind}")
        return payload

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


def _schema_of(payload: PayloadContent, manifest: Manifest) -> tuple[Schema, dict[str, str]]:
    """The schema in a payload, which is the one of the manifest, and its renamed features."""
    try:
        schema = Schema.from_dict(json.loads(payload.metadata["schema"]))
        renamed = {str(new): str(old) for new, old in json.loads(payload.metadata.get("renamed", "{}")).items()}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise SnapshotError(f"{_name(manifest)}: the schema in its payload: {error!r}") from error
    if schema.hash != manifest.schema_hash:
        raise SnapshotError(f"{_name(manifest)}: schema {schema.hash} in its payload, expected {manifest.schema_hash}")
    return schema, renamed


def _name(manifest: Manifest) -> str:
    return f"snapshot {manifest.lineage}:{manifest.version}"
