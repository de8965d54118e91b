"""Snapshot bytes and manifest: what goes in comes out, and damage is named."""

import io
import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
import torch

from feature_store.manifest import Chunk, Manifest
from feature_store.payload import decode, decode_metadata, encode
from smes.errors import SnapshotError

MANIFEST = Manifest(
    lineage="a-1",
    version=7,
    parent=5,
    schema_hash="0123456789abcdef",
    step=7,
    created_ms=1_700_000_000_000,
    total_bytes=30,
    chunks=(Chunk(20, "ab" * 32), Chunk(10, "cd" * 32)),
    upload="a-1:7:00",
    event_time_ms=1_600_000_000_000,
    positions={"impressions": {"0": 12, "1": 0}},
    metrics={"click": {"auc": 0.75}},
    feedback_arrivals=((1_700_000_000_001, 3), (1_700_000_000_009, 1)),
)


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
        (lambda payload: payload[:8] + b"!" + payload[9:], "no JSON object"),
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
    with pytest.raises(SnapshotError, match="no object of texts"):
        decode_metadata(len(header).to_bytes(8, "little") + header)


def test_manifest_comes_back() -> None:
    assert Manifest.from_json(MANIFEST.to_json()) == MANIFEST
    bare = replace(MANIFEST, parent=None, event_time_ms=None, positions={}, metrics={}, feedback_arrivals=())
    assert Manifest.from_json(bare.to_json()) == bare


def test_undefined_metrics_become_null_and_numpy_scalars_numbers() -> None:
    manifest = replace(MANIFEST, metrics={"auc": float("nan"), "ne": np.float32(0.5), "n": np.int64(3)})
    assert Manifest.from_json(manifest.to_json()).metrics == {"auc": None, "ne": 0.5, "n": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "7"}, "version: expected a non-negative integer, got '7'"),
        ({"version": True}, "version"),
        ({"version": -1}, "version"),
        ({"parent": 1.5}, "parent"),
        ({"lineage": ""}, "lineage"),
        ({"kind": "delta"}, "kind: expected 'full', got 'delta'"),
        ({"chunks": []}, "chunks"),
        ({"chunks": [{"bytes": 30}]}, r"chunks\[0\]"),
        ({"chunks": [{"bytes": 30, "sha256": "ab"}]}, "64 hex digits"),
        ({"total_bytes": 31}, "total_bytes: expected the sum of the chunks, 30, got 31"),
        ({"positions": {"impressions": {"0": "12"}}}, "positions"),
        ({"feedback_arrivals": [[1]]}, "feedback_arrivals"),
        ({"metrics": []}, "metrics"),
        ({"colour": "blue"}, "colour"),
    ],
)
def test_a_wrong_manifest_is_refused_by_field(change: dict[str, object], message: str) -> None:
    data = json.loads(MANIFEST.to_json()) | change
    with pytest.raises(SnapshotError, match=message):
        Manifest.from_json(json.dumps(data))


def test_a_missing_field_and_no_json_are_refused() -> None:
    data = json.loads(MANIFEST.to_json())
    del data["step"]
    with pytest.raises(SnapshotError, match="step"):
        Manifest.from_json(json.dumps(data))
    with pytest.raises(SnapshotError, match="no JSON"):
        Manifest.from_json(b"{")
