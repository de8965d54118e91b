"""Everything of a version but its rows, as bytes that processes share: who it is, and its dense weights."""

from collections.abc import Mapping
from typing import Any

import msgspec
from safetensors.torch import load, save
from torch import Tensor

from feature_store.manifest import Manifest
from smes.model.config import ModelConfig
from smes.model.serving import RowReader, ServingModel
from smes.schema import Schema
from smes.shared_memory import Bytes, SharedBytes

_LENGTH_BYTES = 8


class _Head(msgspec.Struct, frozen=True):
    manifest: str
    schema: dict[str, Any]
    renamed: dict[str, str]
    model: dict[str, Any]


class VersionBlock:
    """What :func:`write` wrote, read again.

    Args:
        raw: The bytes.

    Attributes:
        manifest, schema, renamed: Of the version; feature → its name before.
        dense: Tensors named ``dense.*``.
    """

    def __init__(self, raw: Bytes) -> None:
        text = raw.tobytes()
        end = _LENGTH_BYTES + int.from_bytes(text[:_LENGTH_BYTES], "little")
        head = msgspec.json.decode(text[_LENGTH_BYTES:end], type=_Head)
        self.manifest = Manifest.from_json(head.manifest)
        self.schema = Schema.from_dict(head.schema)
        self.renamed = head.renamed
        self.dense: dict[str, Tensor] = load(text[end:])
        self._config = ModelConfig.from_dict(head.model)

    def model(self, rows: RowReader) -> ServingModel:
        """The model of the version, with rows that it reads."""
        return ServingModel(self.schema, self._config, self.dense, rows)


def write(manifest: Manifest, model: ServingModel, renamed: Mapping[str, str]) -> SharedBytes:
    """Put a version into memory that others may map."""
    weights = {f"dense.{name}": tensor.clone() for name, tensor in model.dense.state_dict().items()}
    head = msgspec.json.encode(
        _Head(manifest.to_json().decode(), model.schema.to_dict(), dict(renamed), model.config.to_dict())
    )
    parts = [len(head).to_bytes(_LENGTH_BYTES, "little"), head, save(weights)]
    memory = SharedBytes(sum(map(len, parts)))
    memory.array[:] = bytearray(b"".join(parts))
    return memory
