"""A snapshot's payload: what goes in comes out, in bounded memory; damage is named; other formats are refused."""

import json
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from feature_store.payload import BLOCK_ROWS, Block, PayloadContent, Precision, read_payload, rounded, write_payload
from smes.arrays import F32, I64
from smes.errors import SnapshotError
from smes_io.tensor_pieces import TensorInfo, write_header

STORED = Path(__file__).with_name("stored")
METADATA = {"schema": "{}", "schema_hash": "0123456789abcdef", "model": '{"é": 1}', "lineage": "a", "version": "7"}
GROUPS = {"embedding": 4, "wide": 2}
DENSE = {
    "dense.weights": torch.arange(24, dtype=torch.float32).reshape(4, 6)[:, 1],  # not contiguous
    "dense.scalar": torch.tensor(2.5),
    "dense.count": torch.tensor([7]),
    "dense.mask": torch.tensor([True, False]),
    "dense.empty": torch.zeros(0, 3),
    "dense.parameter": torch.nn.Parameter(torch.ones(2)),
}


def table(rows: int, seed: int = 0) -> tuple[I64, dict[str, F32]]:
    rng = np.random.default_rng(seed)
    keys = rng.permutation(np.arange(rows, dtype=np.int64) - rows // 2)
    return keys, {name: rng.normal(size=(rows, c)).astype(np.float32) for name, c in GROUPS.items()}


def in_blocks(keys: I64, columns: dict[str, F32], lengths: Sequence[int]) -> Callable[[], Iterator[Block]]:
    def blocks() -> Iterator[Block]:
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            yield keys[part], {name: column[part] for name, column in columns.items()}
            start += length

    return blocks


def write(rows: int = 5, *, removed: I64 | None = None, precision: Precision = "fp32") -> bytes:
    keys, columns = table(rows)
    blocks = in_blocks(keys, columns, [rows])
    return write_payload(METADATA, DENSE, GROUPS, rows, blocks, removed=removed, precision=precision).joined()


def read(payload: bytes, piece_bytes: int = 1000) -> PayloadContent:
    pieces = [payload[start : start + piece_bytes] for start in range(0, len(payload), piece_bytes)]
    return read_payload(pieces, len(payload))


def all_rows(content: PayloadContent) -> tuple[I64, dict[str, F32]]:
    blocks = list(content.rows())
    columns = {name: np.concatenate([block[name] for _, block in blocks]) for name in content.groups}
    return np.concatenate([keys for keys, _ in blocks]), columns


@pytest.mark.parametrize("piece_bytes", [1, 7, 10**9])
def test_what_is_written_is_read_however_it_is_cut(piece_bytes: int) -> None:
    removed = np.array([-(2**63), 2**63 - 1], np.int64)

    content = read(write(removed=removed), piece_bytes)

    assert content.metadata.items() >= METADATA.items()
    assert (content.kind, content.lineage, content.version, content.precision) == ("delta", "a", 7, "fp32")
    assert (content.groups, content.num_rows) == (GROUPS, 5)
    np.testing.assert_array_equal(content.removed, removed)
    assert content.dense.keys() == DENSE.keys()
    for name, tensor in DENSE.items():
        assert (content.dense[name].dtype, content.dense[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(content.dense[name], tensor.detach())
    keys, columns = all_rows(content)
    expected_keys, expected = table(5)
    np.testing.assert_array_equal(keys, expected_keys)
    for name, column in expected.items():
        np.testing.assert_array_equal(columns[name], column)


@pytest.mark.parametrize(
    "lengths", [[3 * BLOCK_ROWS + 5], [1, BLOCK_ROWS, 2 * BLOCK_ROWS + 4], [BLOCK_ROWS, 0, BLOCK_ROWS, BLOCK_ROWS + 5]]
)
def test_the_bytes_depend_on_the_rows_and_not_on_how_they_came(lengths: list[int]) -> None:
    rows = 3 * BLOCK_ROWS + 5
    keys, columns = table(rows)
    payload = write_payload(METADATA, DENSE, GROUPS, rows, in_blocks(keys, columns, lengths))

    written = payload.joined()

    assert len(written) == payload.total_bytes
    assert written == payload.joined()  # it can be read again
    assert written == write_payload(METADATA, DENSE, GROUPS, rows, in_blocks(keys, columns, [rows])).joined()
    found, _ = all_rows(read(written, 1_000_000))
    np.testing.assert_array_equal(found, keys)


def test_another_safetensors_reader_agrees() -> None:
    found = safetensors.numpy.load(write(removed=np.array([3], np.int64)))

    keys, columns = table(5)
    np.testing.assert_array_equal(found["table.keys.0"], keys)
    np.testing.assert_array_equal(found["table.wide.0"], columns["wide"])
    np.testing.assert_array_equal(found["table.removed"], [3])


def test_without_rows_and_without_a_table() -> None:
    nothing = read(write(0, removed=np.zeros(0, np.int64)))
    assert (nothing.num_rows, nothing.groups, list(nothing.rows())) == (0, GROUPS, [])

    keys = np.arange(3)
    untabled = read(write_payload(METADATA, DENSE, {}, 3, lambda: [(keys, {})]).joined())
    assert untabled.groups == {}
    np.testing.assert_array_equal(next(untabled.rows())[0], keys)


@pytest.mark.parametrize(("precision", "bytes_of_row"), [("fp32", 8 + 24), ("fp16", 8 + 12), ("int8", 8 + 6 + 8)])
def test_a_precision_rounds_each_row_alone(precision: Precision, bytes_of_row: int) -> None:
    keys, columns = table(BLOCK_ROWS + 3)
    columns["embedding"][0] = 0.0
    columns["embedding"][1] = [1e-45, 0, 0, 0]  # the scale would be 0
    columns["embedding"][2] = [1e30, -1e30, 1, 0]
    blocks = in_blocks(keys, columns, [len(keys)])
    payload = write_payload(METADATA, {}, GROUPS, len(keys), blocks, precision=precision)

    assert payload.total_bytes - len(keys) * bytes_of_row < 2000
    found_keys, found = all_rows(read(payload.joined(), 1_000_000))

    np.testing.assert_array_equal(found_keys, keys)
    for name, column in columns.items():
        assert found[name].tobytes() == rounded(column, precision).tobytes()
        alone = np.concatenate([rounded(column[n : n + 1], precision) for n in range(100)])
        assert found[name][:100].tobytes() == alone.tobytes()
        assert np.isfinite(found[name]).all()
        usual = slice(3, None)
        largest = np.abs(column[usual]).max(axis=1, keepdims=True)
        bound = {"fp32": 0.0, "fp16": 2.0**-11, "int8": 0.5 / 127 * 1.001}[precision] * largest
        assert (np.abs(found[name][usual] - column[usual]) <= bound).all()


def test_a_table_is_written_and_read_in_bounded_memory() -> None:
    rows, columns = 40 * BLOCK_ROWS, {"embedding": 16}
    some = {"embedding": np.ones((BLOCK_ROWS, 16), np.float32)}

    def blocks() -> Iterator[Block]:
        for start in range(0, rows, BLOCK_ROWS):
            yield np.arange(start, start + BLOCK_ROWS), some

    payload = write_payload(METADATA, {}, columns, rows, blocks)
    tracemalloc.start()
    try:
        content = read_payload((bytes(piece) for piece in payload.pieces()), payload.total_bytes)
        total = sum(int(keys.sum()) for keys, _ in content.rows())
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert total == rows * (rows - 1) // 2
    assert payload.total_bytes > 180_000_000
    assert peak_bytes < 32_000_000


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda payload: b"", "header cut short"),
        (lambda payload: payload[:40], "header cut short"),
        (lambda payload: payload[:-1], r"bytes after the header, expected \d+"),
        (lambda payload: payload + b"x", r"bytes after the header, expected \d+"),
        (lambda payload: payload[:8] + b"!" + payload[9:], "header: expected a JSON object"),
        (lambda payload: b"\xff" * 8 + payload[8:], "header of 18446744073709551615 bytes, expected at most"),
    ],
)
def test_damage_is_named(damage: Callable[[bytes], bytes], message: str) -> None:
    with pytest.raises(SnapshotError, match=f"^snapshot payload: .*{message}"):
        read(damage(write()))


def test_a_payload_that_is_shorter_or_longer_than_its_length_is_refused() -> None:
    payload = write()

    with pytest.raises(SnapshotError, match="cut short"):
        list(read_payload([payload[:-1]], len(payload)).rows())
    with pytest.raises(SnapshotError, match="more bytes after the last tensor"):
        list(read_payload([payload, b"x"], len(payload)).rows())


def crafted(tensors: list[TensorInfo], **metadata: str) -> bytes:
    """A payload whose tensors are zeros."""
    known = {"format": "4", "kind": "full", "precision": "fp32", "version": "1", "groups": '{"embedding":4}'}
    header = write_header(tensors, known | metadata)
    return header + bytes(sum(info.nbytes for info in tensors))


FLOAT, INTEGER = np.dtype(np.float32), np.dtype(np.int64)
ROWS = [TensorInfo("table.keys.0", INTEGER, (2,)), TensorInfo("table.embedding.0", FLOAT, (2, 4))]
LONGER = [TensorInfo("table.keys.1", INTEGER, (3,)), TensorInfo("table.embedding.1", FLOAT, (3, 4))]
NEXT = [TensorInfo("table.keys.1", INTEGER, (1,)), TensorInfo("table.embedding.1", FLOAT, (1, 4))]


def test_a_crafted_payload_is_read() -> None:
    assert read(crafted(ROWS + NEXT)).num_rows == 3


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (ROWS[:1], {}, "block 0: table.keys.0"),
        (ROWS[1:], {}, "block 0: table.embedding.0"),
        ([ROWS[0], TensorInfo("table.embedding.0", FLOAT, (2, 3))], {}, "block 0"),
        ([ROWS[0], TensorInfo("table.embedding.0", FLOAT, (8,))], {}, "block 0"),
        ([ROWS[0], TensorInfo("table.embedding.0", np.dtype(np.float16), (2, 4))], {}, "block 0"),
        ([TensorInfo("table.keys.0", FLOAT, (2,)), ROWS[1]], {}, "block 0"),
        ([TensorInfo("table.keys.0", INTEGER, ()), ROWS[1]], {}, "block 0"),
        ([TensorInfo("table.keys.0", INTEGER, (0,)), TensorInfo("table.embedding.0", FLOAT, (0, 4))], {}, "block 0"),
        (NEXT + ROWS, {}, "block 0"),
        (ROWS + LONGER, {}, "block 1"),
        (ROWS, {"groups": "{}"}, "block 0|block 1"),
        (ROWS, {"groups": '{"embedding": 0}'}, "groups"),
        (ROWS, {"groups": '{"embedding": 1e9}'}, "groups"),
        (ROWS, {"groups": '{"a.b": 4}'}, "groups"),
        (ROWS, {"groups": "[]"}, "groups"),
        (ROWS, {"kind": "delta"}, "no int64 .* table.removed"),
        ([TensorInfo("table.removed", FLOAT, (2,)), *ROWS], {"kind": "delta"}, "no int64 .* table.removed"),
        ([TensorInfo("table.removed", INTEGER, (2,)), *ROWS], {}, "block 0"),
        ([*ROWS, TensorInfo("dense.w", FLOAT, (2,))], {}, "block 1"),
        (ROWS, {"kind": "base"}, "kind base"),
        (ROWS, {"precision": "fp8"}, "precision fp8"),
        (ROWS, {"precision": "int8"}, "block 0"),
        (ROWS, {"version": "-1"}, "version '-1'"),
        (ROWS, {"version": "²"}, "version '²'"),
        (ROWS, {"version": "1" * 5000}, "version '111"),
    ],
)  # fmt: skip
def test_tensors_that_are_no_payload_are_refused(
    tensors: list[TensorInfo], metadata: dict[str, str], message: str
) -> None:
    with pytest.raises(SnapshotError, match=f"^snapshot payload: .*({message})"):
        list(read(crafted(tensors, **metadata)).rows())


def header(entries: dict[str, Any]) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"__metadata__": {"k": 1}}, "expected a JSON object of tensors and texts"),
        ({"w": {"dtype": "F32", "shape": [2**53, 2**53], "data_offsets": [0, 8]}}, "at .0, 8., expected"),
        ({"w": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]}}, "expected a JSON object of tensors"),
        ({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}}, "expected a JSON object of tensors"),
        ({"w": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}}, "type 'F33', expected one of F64"),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "at .4, 8., expected .0, 4."),
        ({n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "vw"}, "expected .8, 16."),
        ({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, "8 bytes after the header, expected"),
    ],
)
def test_a_header_that_lies_is_refused_before_anything_is_allocated(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(SnapshotError, match=f"^snapshot payload: .*{message}"):
        read(header(entries) + bytes(8))


def test_a_length_that_lies_allocates_only_what_arrives() -> None:
    """A manifest may claim any length; memory is taken as verified bytes come."""
    big = TensorInfo("dense.w", FLOAT, (2**38,))
    header_bytes = write_header(
        [big], {"format": "4", "kind": "full", "precision": "fp32", "version": "1", "groups": "{}"}
    )

    with pytest.raises(SnapshotError, match=r"tensor dense.w cut short \(4000 bytes, 1099511627776 expected\)"):
        read_payload([header_bytes, bytes(4000)], len(header_bytes) + big.nbytes)


def test_names_and_counts_that_no_payload_has_are_refused_when_writing() -> None:
    keys, columns = table(5)
    with pytest.raises(ValueError, match=r"dense weights 'weights', expected names that begin with 'dense\.'"):
        write_payload(METADATA, {"weights": torch.ones(1)}, GROUPS, 0, list)
    with pytest.raises(ValueError, match="5 rows, expected 6"):
        write_payload(METADATA, {}, GROUPS, 6, lambda: [(keys, columns)]).joined()
    with pytest.raises(ValueError, match="more than 4 rows, expected that many"):
        write_payload(METADATA, {}, GROUPS, 4, lambda: [(keys, columns)]).joined()


def test_a_payload_stored_earlier_is_read_and_written_byte_for_byte() -> None:
    stored = (STORED / "payload_format_4.safetensors").read_bytes()

    content = read(stored)

    assert (content.kind, content.version, content.removed.tolist()) == ("delta", 7, [9])
    assert stored == write(removed=np.array([9], np.int64), precision="int8")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_payload_of_an_earlier_format_is_refused_by_its_number(number: int) -> None:
    with pytest.raises(SnapshotError, match=rf"^snapshot payload: format {number}, expected 4$"):
        read((STORED / f"payload_format_{number}.safetensors").read_bytes())


def test_a_payload_of_a_later_format_is_refused_by_its_number() -> None:
    with pytest.raises(SnapshotError, match=r"^snapshot payload: format 5, expected 4$"):
        read(crafted(ROWS, format="5"))
