"""A snapshot's weights as bytes. :mod:`feature_store.publication` describes those bytes.

The payload is safetensors: named tensors and text metadata; reading it runs no code. Its metadata:

=============== ====================================================================
``format``      decimal digits of :data:`PAYLOAD_FORMAT`; a payload without it is of format 1
``schema``      JSON of :meth:`smes.schema.Schema.to_dict`
``schema_hash`` :attr:`smes.schema.Schema.hash`
``model``       JSON of the model configuration
``lineage``     the lineage that the weights belong to
``version``     decimal digits of the version
=============== ====================================================================
"""

import json
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from smes.errors import SnapshotError

PAYLOAD_FORMAT = 3
"""Format 2 holds a nested model configuration, format 3 how rare tasks learn. Only this format is read."""

_MAX_HEADER_BYTES = 8 * 1024 * 1024
_LENGTH_BYTES = 8  # safetensors: little-endian uint64 length of the JSON header, the header, the tensors
_METADATA = "__metadata__"
_FORMAT = "format"


def encode(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """Pack tensors and text metadata into safetensors bytes, and mark them with :data:`PAYLOAD_FORMAT`.

    Args:
        tensors: Name → dense tensor on any device; copied to the CPU and made contiguous.
        metadata: Name → text.

    Raises:
        ValueError: A tensor is sparse or of a type that safetensors does not know.
    """
    plain: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        packed = tensor.detach().cpu().contiguous()
        storage = packed.untyped_storage().data_ptr()
        # safetensors refuses tensors that share storage, so the second view of a storage gets a copy.
        plain[name] = packed.clone() if storage in storages else packed
        storages.add(storage)
    return save(plain, {**metadata, _FORMAT: str(PAYLOAD_FORMAT)})


def decode(payload: bytes) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The inverse of :func:`encode`; tensors are on the CPU.

    Raises:
        SnapshotError: The payload is of another format, cut short, padded, or not safetensors; the message says which.
    """
    metadata = decode_metadata(payload)
    try:
        return load(payload), metadata
    except (SafetensorError, KeyError, ValueError) as error:
        raise SnapshotError(f"snapshot payload of {len(payload)} bytes: {error}") from error


def decode_metadata(payload: bytes) -> dict[str, str]:
    """The metadata that :func:`encode` was given, without reading the tensors.

    Raises:
        SnapshotError: The payload is of another format, its header is cut short, or the header is not a JSON object
            with text metadata.
    """
    metadata = _header_metadata(payload)
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SnapshotError("snapshot payload: metadata: expected an object of texts")
    found = metadata.pop(_FORMAT, "1")
    if found != str(PAYLOAD_FORMAT):
        raise SnapshotError(f"snapshot payload: format {found}, expected {PAYLOAD_FORMAT}")
    return metadata


def _header_metadata(payload: bytes) -> object:
    length = int.from_bytes(payload[:_LENGTH_BYTES], "little")
    if len(payload) < _LENGTH_BYTES or length > len(payload) - _LENGTH_BYTES:
        raise SnapshotError(f"snapshot payload: header cut short ({len(payload)} bytes, header of {length} expected)")
    if length > _MAX_HEADER_BYTES:
        raise SnapshotError(f"snapshot payload: header of {length} bytes, expected at most {_MAX_HEADER_BYTES}")
    try:
        return json.loads(payload[_LENGTH_BYTES : _LENGTH_BYTES + length])[_METADATA]
    except KeyError:
        return {}
    except (ValueError, TypeError, RecursionError) as error:
        raise SnapshotError(f"snapshot payload: header: expected a JSON object: {error}") from error
