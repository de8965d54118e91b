"""The schemas from which a lineage was carried over: named in manifests, and kept in checkpoints for audits."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feature_store.manifest import MAX_CARRIED_FROM
from smes.schema import Schema


@dataclass(frozen=True, slots=True)
class SchemasBefore:
    """The schemas before, the last one first; at most :data:`feature_store.manifest.MAX_CARRIED_FROM`.

    Attributes:
        hashes: Their hashes.
        schemas: Hash → schema as plain data, of those that are known.
    """

    hashes: tuple[str, ...] = ()
    schemas: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    def then(self, schema: Schema) -> "SchemasBefore":
        """These, and a schema that was carried over from just now."""
        others = [each for each in self.hashes if each != schema.hash]
        hashes = (schema.hash, *others)[:MAX_CARRIED_FROM]
        known = {**self.schemas, schema.hash: schema.to_dict()}
        return SchemasBefore(hashes, {each: known[each] for each in hashes if each in known})

    def without(self, schema_hash: str) -> tuple[str, ...]:
        """The hashes but for one: of the schema that a manifest is of, to which a lineage may have come back."""
        return tuple(each for each in self.hashes if each != schema_hash)

    def array(self) -> NDArray[np.uint8]:
        """JSON as bytes, from which :meth:`of` reads it."""
        text = json.dumps({"hashes": list(self.hashes), "schemas": dict(self.schemas)})
        return np.frombuffer(text.encode(), np.uint8)

    @classmethod
    def of(cls, array: NDArray[np.uint8]) -> "SchemasBefore":
        """The inverse of :meth:`array`."""
        data = json.loads(array.tobytes())
        return cls(tuple(data["hashes"]), data["schemas"])

    def known(self) -> list[Schema]:
        """The schemas that are known, the last one first."""
        return [Schema.from_dict(self.schemas[each]) for each in self.hashes if each in self.schemas]
