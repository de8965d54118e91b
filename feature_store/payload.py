"""What serving needs of the weights, as bytes. The manifest that describes those bytes is in :mod:`feature_store.manifest`.

The payload is safetensors: named tensors and string metadata, nothing that runs on reading. Its metadata:

============= ===========================================================
``schema``      JSON of :meth:`smes.schema.Schema.to_dict`
``schema_hash`` :attr:`smes.schema.Schema.hash`
``model``       JSON of the model configuration
``lineage``     the lineage the weights belong to
``version``     decimal digits of the version
============= ===========================================================
"""

import json
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from smes.errors import SnapshotError

_LENGTH_BYTES = 8  # safetensors: little-endian uint64 length of the JSON header, the header, the tensors
_METADATA = "__metadata__"


def encode(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """Pack tensors and text metadata into safetensors bytes.

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
        # safetensors refuses tensors that share storage, so the second view of one gets bytes of its own.
        plain[name] = packed.clone() if storage in storages else packed
        storages.add(storage)
    return save(plain, dict(metadata))


def decode(payload: bytes) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The inverse of :func:`encode`; tensors on the CPU.

    Raises:
        SnapshotError: The payload is cut short, padded, or no safetensors; the message says what is damaged.
    """
    metadata = decode_metadata(payload)
    try:
        return load(payload), metadata
    except (SafetensorError, KeyError, ValueError) as error:
        raise SnapshotError(f"snapshot payload of {len(payload)} bytes: {error}") from error


def decode_metadata(payload: bytes) -> dict[str, str]:
    """Only the metadata of a payload, without touching its tensors.

    Raises:
        SnapshotError: The header is cut short or no JSON object with text metadata.
    """
    length = int.from_bytes(payload[:_LENGTH_BYTES], "little")
    if len(payload) < _LENGTH_BYTES or length > len(payload) - _LENGTH_BYTES:
        raise SnapshotError(f"snapshot payload: header cut short ({len(payload)} bytes, header of {length} expected)")
    try:
        metadata = json.loads(payload[_LENGTH_BYTES : _LENGTH_BYTES + length])[_METADATA]
    except (ValueError, TypeError) as error:
        raise SnapshotError(f"snapshot payload: header is no JSON object: {error}") from error
    except KeyError:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SnapshotError("snapshot payload: metadata is no object of texts")
    return metadata
