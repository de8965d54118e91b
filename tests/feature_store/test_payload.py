"""A snapshot's payload: what goes in comes out, damage is named, and another format is refused by its number."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from feature_store.payload import decode, decode_metadata, encode
from smes.errors import SnapshotError

STORED = Path(__file__).with_name("stored")


def test_tensors_and_metadata_come_back() -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "rows": base[:2],
        "column": base[:, 1],  # not contiguous, and of the same storage
        "ids": torch.tensor([-(2**63), 2**63 - 1]),
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }

    decoded, metadata = decode(encode(tensors, {"lineage": "a", "model": '{"é": 1}'}))

    assert metadata == {"lineage": "a", "model": '{"é": 1}'}
    assert decoded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert decoded[name].dtype == tensor.dtype
        assert torch.equal(decoded[name], tensor.detach())


def test_another_safetensors_reader_agrees() -> None:
    payload = encode({"w": torch.tensor([[1.0, 2.0]])}, {"k": "v"})

    np.testing.assert_array_equal(safetensors.numpy.load(payload)["w"], [[1.0, 2.0]])


def test_encoding_does_not_alias_the_weights() -> None:
    weight = torch.zeros(3)
    payload = encode({"w": weight}, {})
    weight += 1

    decoded, metadata = decode(payload)

    assert metadata == {}
    assert torch.equal(decoded["w"], torch.zeros(3))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda payload: b"", "header cut short"),
        (lambda payload: payload[:40], "header cut short"),
        (lambda payload: payload[:-1], "not fully covered"),
        (lambda payload: payload + b"x", "not fully covered"),
        (lambda payload: payload[:8] + b"!" + payload[9:], "header: expected a JSON object"),
    ],
)
def test_damage_is_named(damage: Callable[[bytes], bytes], message: str) -> None:
    payload = encode({"w": torch.ones(4)}, {"k": "v"})

    with pytest.raises(SnapshotError, match=message):
        decode(damage(payload))


def test_pickled_tensors_are_refused() -> None:
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(4)}, buffer)

    with pytest.raises(SnapshotError):
        decode(buffer.getvalue())


def test_metadata_that_is_no_text_is_refused() -> None:
    header = json.dumps({"__metadata__": {"k": 1}}).encode()

    with pytest.raises(SnapshotError, match="metadata: expected an object of texts"):
        decode_metadata(len(header).to_bytes(8, "little") + header)


def test_a_payload_stored_earlier_is_read() -> None:
    tensors, metadata = decode((STORED / "payload_format_3.safetensors").read_bytes())

    assert torch.equal(tensors["weights"], torch.arange(4.0))
    assert metadata == {
        "schema": "{}",
        "schema_hash": "0123456789abcdef",
        "model": "{}",
        "lineage": "a",
        "version": "7",
    }


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("read", [decode, decode_metadata])
def test_a_payload_of_an_earlier_format_is_refused_by_its_number(read: Callable[[bytes], object], number: int) -> None:
    with pytest.raises(SnapshotError, match=rf"^snapshot payload: format {number}, expected 3$"):
        read((STORED / f"payload_format_{number}.safetensors").read_bytes())


def test_a_payload_of_a_later_format_is_refused_by_its_number() -> None:
    payload = safetensors.torch.save({"w": torch.ones(1)}, {"format": "4"})

    with pytest.raises(SnapshotError, match=r"^snapshot payload: format 4, expected 3$"):
        decode(payload)
