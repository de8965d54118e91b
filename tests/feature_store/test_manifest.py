"""A snapshot's manifest: its JSON, and what is wrong with one, by field."""

import json
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from feature_store.publication import Chunk, Manifest
from smes.errors import SnapshotError

STORED = Path(__file__).with_name("stored") / "manifest.json"
MANIFEST = Manifest(
    lineage="a-1",
    version=7,
    parent=5,
    schema_hash="0123456789abcdef",
    step=7,
    created_ms=1_700_000_000_000,
    published_ms=1_700_000_000_050,
    total_bytes=30,
    chunks=(Chunk(20, "ab" * 32), Chunk(10, "cd" * 32)),
    upload="a-1:7:00",
    event_time_ms=1_600_000_000_000,
    kind="full",
    precision="fp32",
    positions={"impressions": {"0": 12, "1": 0}},
    metrics={"click": {"auc": 0.75}},
    feedback_arrivals=((1_700_000_000_001, 3, 5, 6, 7), (1_700_000_000_009, 1, 0, 0, 2)),
    carried_from=("fedcba9876543210",),
    held=None,
    signature=None,
)


DELTA = replace(MANIFEST, kind="delta", precision="int8")
BARE = replace(MANIFEST, parent=None, event_time_ms=None, positions={}, metrics={}, feedback_arrivals=())


@pytest.mark.parametrize("manifest", [MANIFEST, DELTA, BARE], ids=["full", "delta", "bare"])
def test_a_manifest_comes_back(manifest: Manifest) -> None:
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_undefined_metrics_become_null_and_numpy_scalars_numbers() -> None:
    manifest = replace(MANIFEST, metrics={"auc": float("nan"), "ne": np.float32(0.5), "n": np.int64(3)})

    assert Manifest.from_json(manifest.to_json()).metrics == {"auc": None, "ne": 0.5, "n": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "7"}, "version: expected `int`, got `str`"),
        ({"version": True}, "version: expected `int`, got `bool`"),
        ({"version": 7.0}, "version: expected `int`, got `float`"),
        ({"version": None}, "version: expected `int`, got `null`"),
        ({"version": -1}, "version: expected `int` >= 0"),
        ({"version": 2**53}, "version: expected `int` <= 9007199254740991"),
        ({"parent": 1.5}, "parent: expected `int | null`, got `float`"),
        ({"lineage": ""}, "lineage: expected `str` of length >= 1"),
        ({"kind": "base"}, "kind: invalid enum value 'base'"),
        ({"precision": "fp8"}, "precision: invalid enum value 'fp8'"),
        ({"kind": "delta", "parent": None}, "parent: None, expected a version before 7"),
        ({"kind": "delta", "parent": 7}, "parent: 7, expected a version before 7"),
        ({"chunks": []}, "chunks: expected `array` of length >= 1"),
        ({"chunks": [{"bytes": 30}]}, r"chunks\[0\]: object missing required field `sha256`"),
        ({"chunks": [{"bytes": 30, "sha256": "ab"}]}, r"chunks\[0\]\.sha256: expected `str` matching regex .*\{64\}"),
        ({"chunks": [{"bytes": 30, "sha256": "x" * 64}]}, r"chunks\[0\]\.sha256: expected `str` matching regex"),
        ({"total_bytes": 31}, "total_bytes: expected the sum of the chunks, 30, got 31"),
        ({"positions": {"impressions": {"0": "12"}}}, r"positions\[...\]\[...\]: expected `int`, got `str`"),
        ({"positions": {"impressions": {"0": -1}}}, r"positions\[...\]\[...\]: expected `int` >= 0"),
        ({"feedback_arrivals": [[1]]}, r"feedback_arrivals\[0\]: expected `array` of length 5"),
        ({"feedback_arrivals": [[1, -1, 0, 0, 0]]}, r"feedback_arrivals\[0\]\[1\]: expected `int` >= 0"),
        ({"metrics": []}, "metrics: expected `object`, got `array`"),
        ({"colour": "blue"}, "object contains unknown field `colour`"),
    ],
)
def test_a_wrong_manifest_is_refused_by_field(change: dict[str, object], message: str) -> None:
    data = json.loads(MANIFEST.to_json()) | change

    with pytest.raises(SnapshotError, match=f"^snapshot manifest: {message}"):
        Manifest.from_json(json.dumps(data))


@pytest.mark.parametrize("name", sorted(set(Manifest.__struct_fields__) - {"parts", "chunks_in"}))
def test_a_missing_field_is_refused(name: str) -> None:
    data = json.loads(MANIFEST.to_json())
    del data[name]

    with pytest.raises(SnapshotError, match=f"object missing required field `{name}`"):
        Manifest.from_json(json.dumps(data))


@pytest.mark.parametrize("text", [b"", b"{", b'{"lineage": "\xff"}', b"manifest"])
def test_what_is_not_json_is_refused(text: bytes) -> None:
    with pytest.raises(SnapshotError, match="snapshot manifest: expected JSON"):
        Manifest.from_json(text)


def test_a_list_is_refused() -> None:
    with pytest.raises(SnapshotError, match="snapshot manifest: expected `object`, got `array`"):
        Manifest.from_json(b"[]")


def test_a_manifest_stored_earlier_is_read_and_written_byte_for_byte() -> None:
    stored = STORED.read_bytes()

    manifest = Manifest.from_json(stored)

    assert manifest.version == 7
    assert manifest.to_json() == stored
