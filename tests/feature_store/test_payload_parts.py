"""Payloads of several ranks: all parts together are read as one payload, and nothing else is."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from feature_store.manifest import Chunk, Manifest, Part
from feature_store.payload import write_payload
from feature_store.payload_parts import part_text, read_published
from smes.errors import SnapshotError
from tests.feature_store.test_payload import DENSE, GROUPS, METADATA, all_rows, in_blocks, table
from tests.manifests import make_manifest

ROWS = (4, 0, 3)
"""Of the ranks' parts."""


def part(rank: int, *, of: int = 3, dense: Mapping[str, torch.Tensor] | None = None, **changes: str) -> bytes:
    keys, columns = table(sum(ROWS))
    some = slice(sum(ROWS[:rank]), sum(ROWS[: rank + 1]))
    mine = keys[some], {name: column[some] for name, column in columns.items()}
    return write_payload(
        METADATA | {"part": part_text(rank, of)} | changes,
        (DENSE if rank == 0 else {}) if dense is None else dense,
        GROUPS,
        ROWS[rank],
        in_blocks(*mine, [ROWS[rank]]),
        removed=np.array([100 + rank] * (rank != 1), np.int64),
    ).joined()


def manifest_of(parts: list[bytes], rows: tuple[int, ...] = ROWS) -> Manifest:
    chunks = tuple(Chunk(len(some), "0" * 64) for text in parts for some in halves(text))
    return make_manifest(
        7,
        kind="delta",
        parent=6,
        chunks=chunks,
        total_bytes=sum(map(len, parts)),
        parts=tuple(Part(2, count) for count in rows),
    )


def halves(text: bytes) -> tuple[bytes, bytes]:
    return text[: len(text) // 2], text[len(text) // 2 :]


def read(parts: list[bytes], rows: tuple[int, ...] = ROWS) -> Any:
    content = read_published((piece for text in parts for piece in halves(text)), manifest_of(parts, rows))
    return content, all_rows(content)


def test_parts_are_read_as_one_payload() -> None:
    content, (keys, columns) = read([part(rank) for rank in range(3)])

    expected_keys, expected = table(sum(ROWS))
    np.testing.assert_array_equal(keys, expected_keys)
    for name in GROUPS:
        np.testing.assert_array_equal(columns[name], expected[name])
    assert content.num_rows == sum(ROWS)
    np.testing.assert_array_equal(content.removed, [100, 102])
    assert content.dense.keys() == DENSE.keys()
    assert (content.lineage, content.version, content.kind) == ("a", 7, "delta")
    manifest = manifest_of([part(rank) for rank in range(3)])
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([part(0), part(2), part(1)], "part 2/3 with 3 rows, expected 1/3 with 0"),
        ([part(0), part(1)], "part 0/3 with 4 rows, expected 0/2 with 4"),
        ([part(0), part(1, version="8"), part(2)], "part 1 differs from part 0 in version, expected the same"),
        ([part(0), part(1), part(2, schema_hash="f")], "part 2 differs from part 0 in schema_hash"),
        ([part(0), part(1, dense=DENSE), part(2)], "dense weights in part 1, expected them in part 0 alone"),
        ([part(0), part(1), part(2)[:-1] + b"", b"x"], "cut short|expected .* with"),
    ],
)
def test_other_parts_are_refused(parts: list[bytes], expected: str) -> None:
    rows = (4, 0, 3, 0)[: len(parts)]
    with pytest.raises(SnapshotError, match=expected):
        read(parts, rows)


def test_a_manifest_says_what_parts_there_are() -> None:
    parts = [part(rank) for rank in range(3)]
    whole = manifest_of(parts)
    for wrong, expected in (
        ((Part(6, 7),), "parts: 1 with 6 chunks, expected at least 2 with 6"),
        ((Part(2, 4), Part(2, 0)), "parts: 2 with 4 chunks, expected at least 2 with 6"),
        ((Part(2, 10**6), Part(4, 3)), "parts: part 0: 1000000 rows in"),
    ):
        with pytest.raises(SnapshotError, match=expected):
            Manifest.from_json(make_manifest(**_fields(whole, wrong)).to_json())
    alone = make_manifest()
    assert b"parts" not in alone.to_json()  # readers from before there were such snapshots read it
    with pytest.raises(SnapshotError, match=r"a part of a payload, 0/3, expected all of it"):
        read_published(
            [parts[0]], make_manifest(7, total_bytes=len(parts[0]), chunks=(Chunk(len(parts[0]), "0" * 64),))
        )


def _fields(manifest: Manifest, parts: tuple[Part, ...]) -> dict[str, Any]:
    return {"version": 7, "chunks": manifest.chunks, "total_bytes": manifest.total_bytes, "parts": parts}
