"""A snapshot's weights as bytes, written and read in pieces: never is the whole table in memory twice.

The payload is safetensors (:mod:`smes_io.tensor_pieces`): named tensors and text metadata; reading it runs no code. Its
tensors, in the order of their bytes:

=========================== =============================================================================
``dense.*``                 the model's weights and running moments, as they are
``table.removed``           int64 [M], keys that the parent has and this version has not; of a delta only
``table.keys.{i}``          int64 [N_i], the keys of block i
``table.{group}.{i}``       [N_i, C], the weights of these rows in a column group, in the payload's precision
``table.{group}.scale.{i}`` float32 [N_i], of ``int8`` only: a weight is its number times its row's scale
=========================== =============================================================================

Every block but the last has the same number of rows. A full payload holds every row; a delta the rows that were born or
changed since its parent. All keys of a payload are distinct. Its metadata:

=============== ====================================================================
``format``      decimal digits of :data:`PAYLOAD_FORMAT`; a payload without it is of format 1
``schema``      JSON of :meth:`smes.schema.Schema.to_dict`
``schema_hash`` :attr:`smes.schema.Schema.hash`
``model``       JSON of the model configuration
``lineage``     the lineage that the weights belong to
``version``     decimal digits of the version
``kind``        ``full`` or ``delta``
``precision``   ``fp32``, ``fp16`` or ``int8``: of the rows' weights; dense weights stay as they are
``groups``      JSON: column group → C, in the order of the tensors of a block
``renamed``     JSON: feature → its name before, by which older rows in the feature store
                have it; only where some were renamed
``part``        ``k/N``: what rank k of N wrote; only where N > 1 (:mod:`feature_store.payload_parts`)
=============== ====================================================================

The precision is a function of each row alone. So a row has the same bits in a delta and in a full payload, and a full
payload with the deltas after it gives the same weights as the full payload of the last one, in every precision.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal, TypeVar, cast, get_args

import msgspec
import numpy as np
import torch
from msgspec import Meta
from numpy.typing import NDArray

from feature_store.pieces import Payload
from smes.arrays import F32, I64
from smes.errors import SnapshotError
from smes_io.tensor_pieces import Piece, PieceReader, TensorInfo, write_header

PAYLOAD_FORMAT = 4
"""Format 4 holds rows in blocks, and deltas. Only this format is read."""

Precision = Literal["fp32", "fp16", "int8"]
"""How the weights of rows are written: as they are; rounded to half precision; or row by row as 8-bit numbers and a
scale, the largest weight of the row over 127."""

Kind = Literal["full", "delta"]

Block = tuple[I64, dict[str, F32]]
"""Keys int64 [N], and the weights by column group, float32 [N, C]."""

BLOCK_ROWS = 65_536
"""Rows of a block; more where there would be too many blocks for a header."""

_MAX_BLOCKS = 4096
_MAX_BLOCK_BYTES = 512 * 1024 * 1024
_GROUPS = msgspec.json.Decoder(
    Annotated[
        dict[Annotated[str, Meta(pattern=r"^[a-z_]{1,40}\Z")], Annotated[int, Meta(ge=1, le=65_536)]],
        Meta(max_length=16),
    ]
)
_FORMAT = "format"
_REMOVED = "table.removed"
_T = TypeVar("_T")


def write_payload(
    metadata: Mapping[str, str],
    dense: Mapping[str, torch.Tensor],
    groups: Mapping[str, int],
    num_rows: int,
    blocks: Callable[[], Iterable[Block]],
    *,
    removed: I64 | None = None,
    precision: Precision = "fp32",
) -> Payload:
    """A payload whose rows are read, packed and given away block by block.

    Args:
        metadata: ``schema``, ``schema_hash``, ``model``, ``lineage`` and ``version``, see the module.
        dense: ``dense.*`` → weights, which nobody changes until the payload was written.
        groups: Column group → columns.
        num_rows: How many rows ``blocks`` gives in all.
        blocks: Begins to read the rows: distinct keys and float32 weights, in blocks of any length.
        removed: int64 [M], distinct keys that went, of a delta; None: the payload is full.
        precision: Of the rows' weights.

    Raises:
        ValueError: A dense name does not begin with ``dense.``, or there are too many tensors for a header.
    """
    values = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in dense.items()}
    if wrong := [name for name in values if not name.startswith("dense.")]:
        raise ValueError(f"dense weights {wrong[0]!r}, expected names that begin with 'dense.'")
    if removed is not None:
        values[_REMOVED] = removed
    rows_of_block = max(BLOCK_ROWS, -(-num_rows // _MAX_BLOCKS))
    infos = [TensorInfo.of(name, array) for name, array in values.items()]
    for i, start in enumerate(range(0, num_rows, rows_of_block)):
        infos += _block_tensors(i, min(rows_of_block, num_rows - start), groups, precision)
    kind: Kind = "full" if removed is None else "delta"
    marks = {_FORMAT: str(PAYLOAD_FORMAT), "kind": kind, "precision": precision, "groups": json.dumps(dict(groups))}
    header = write_header(infos, {**metadata, **marks})

    def pieces() -> Iterator[Piece]:
        yield header
        for array in values.values():
            yield _bytes_of(array)
        for keys, columns in _of_equal_length(blocks(), groups, num_rows, rows_of_block):
            yield _bytes_of(keys)
            for name in groups:
                for packed in _packed(columns[name], precision):
                    yield _bytes_of(packed)

    return Payload(len(header) + sum(info.nbytes for info in infos), pieces, num_rows)


@dataclass(frozen=True, slots=True)
class PayloadContent:
    """A payload whose rows are still to be read.

    Attributes:
        metadata: See the module.
        kind: ``full``, or ``delta``: what changed since the parent.
        lineage, version: Of the weights.
        precision: Of the rows' weights.
        groups: Column group → columns.
        num_rows: Rows that :meth:`rows` gives.
        dense: ``dense.*`` → weights.
    """

    metadata: Mapping[str, str]
    kind: Kind
    lineage: str
    version: int
    precision: Precision
    groups: Mapping[str, int]
    num_rows: int
    dense: dict[str, torch.Tensor]
    _removed: list[I64] = field(repr=False)
    _blocks: Callable[[], Iterator[Block]] = field(repr=False)

    @property
    def removed(self) -> I64:
        """int64 [M], distinct keys that went; none in a full payload.

        Where several ranks wrote it, all of them are here once all rows were read.
        """
        return self._removed[0] if len(self._removed) == 1 else np.concatenate(self._removed)

    def rows(self) -> Iterator[Block]:
        """The rows, block by block, once: new arrays of keys and float32 weights.

        That the keys of different blocks are distinct and that weights are finite is for the reader to check.

        Raises:
            SnapshotError: The payload is shorter or longer than it says. Also what the pieces raise.
        """
        return self._blocks()

    def followed_by(self, parts: Iterable["PayloadContent"], num_rows: int) -> "PayloadContent":
        """This part of a payload and those of other ranks, each of which is asked for when the one before was read.

        Args:
            parts: The others, without dense weights.
            num_rows: Of all of them.
        """
        removed = list(self._removed)

        def blocks() -> Iterator[Block]:
            yield from self.rows()
            for part in parts:
                removed.append(part.removed)
                yield from part.rows()

        return replace(self, num_rows=num_rows, _removed=removed, _blocks=blocks)


def read_payload(pieces: Iterable[Piece], total_bytes: int) -> PayloadContent:
    """Read a payload that one process wrote, or a rank's part of one, from its pieces, up to the rows.

    What several ranks wrote is read by :func:`feature_store.payload_parts.read_published`.

    Args:
        pieces: As :meth:`feature_store.snapshots.SnapshotStore.pieces` gives them.
        total_bytes: Their length in all (:attr:`feature_store.manifest.Manifest.total_bytes`).

    Raises:
        SnapshotError: It is of another format, cut short, or its tensors are not those of a payload; nothing larger
            than what has arrived was allocated. Also what ``pieces`` raise.
    """
    reader = _checked(partial(PieceReader, pieces, total_bytes))
    metadata = dict(reader.metadata)
    if (found := metadata.pop(_FORMAT, "1")) != str(PAYLOAD_FORMAT):
        raise SnapshotError(f"snapshot payload: format {found[:40]}, expected {PAYLOAD_FORMAT}")
    kind, precision = metadata.get("kind"), metadata.get("precision")
    if kind not in get_args(Kind) or precision not in get_args(Precision):
        raise SnapshotError(
            f"snapshot payload: kind {str(kind)[:40]}, precision {str(precision)[:40]}, expected one of "
            f"{', '.join(get_args(Kind))} and one of {', '.join(get_args(Precision))}"
        )
    version = metadata.get("version", "")
    if not (version.isascii() and version.isdigit() and len(version) <= 16):
        raise SnapshotError(f"snapshot payload: version {version[:40]!r}, expected decimal digits")
    tensors = list(reader.tensors)
    first = next((i for i, t in enumerate(tensors) if not t.name.startswith("dense.")), len(tensors))
    small, rest = tensors[:first], tensors[first:]
    if kind == "delta":
        if not rest or rest[0].name != _REMOVED or rest[0].dtype != np.int64 or len(rest[0].shape) != 1:
            raise SnapshotError(f"snapshot payload: no int64 [M] {_REMOVED} after the dense weights, expected one")
        small.append(rest.pop(0))
    groups = _groups_in(metadata.get("groups", ""))
    blocks = _blocks_of(rest, groups, cast(Precision, precision))
    values = {info.name: _checked(partial(reader.read, info)) for info in small}
    removed: I64 = values.pop(_REMOVED, np.zeros(0, np.int64))
    return PayloadContent(
        metadata=metadata,
        kind=cast(Kind, kind),
        lineage=metadata.get("lineage", ""),
        version=int(version),
        precision=cast(Precision, precision),
        groups=groups,
        num_rows=sum(blocks),
        dense={name: torch.from_numpy(array) for name, array in values.items()},
        _removed=[removed],
        _blocks=lambda: _rows_of(reader, blocks, groups, cast(Precision, precision)),
    )


def _rows_of(
    reader: PieceReader, blocks: Sequence[int], groups: Mapping[str, int], precision: Precision
) -> Iterator[Block]:
    for i, n in enumerate(blocks):
        infos = _block_tensors(i, n, groups, precision)
        keys, *packed = [_checked(partial(reader.read, info)) for info in infos]
        of_group = 2 if precision == "int8" else 1
        values, scales = packed[::of_group], packed[1::of_group] if of_group == 2 else [None] * len(groups)
        yield keys, dict(zip(groups, map(_unpacked, values, scales), strict=True))
    _checked(reader.end)


def rounded(weights: F32, precision: Precision) -> F32:
    """The weights of rows, float32 [N, C], as a reader gets them in this precision."""
    packed = list(_packed(weights, precision))
    return _unpacked(packed[0], packed[1] if precision == "int8" else None)


def _groups_in(text: str) -> dict[str, int]:
    try:
        groups: dict[str, int] = _GROUPS.decode(text)
    except msgspec.MsgspecError as error:
        raise SnapshotError(f"snapshot payload: groups {text[:40]!r}: {error}") from error
    return groups


def _blocks_of(tensors: list[TensorInfo], groups: Mapping[str, int], precision: Precision) -> tuple[int, ...]:
    """Rows of each block, if these tensors are the blocks of a payload."""
    per_block = len(_block_tensors(0, 0, groups, precision))
    blocks: list[int] = []
    for i, start in enumerate(range(0, len(tensors), per_block)):
        some = tensors[start : start + per_block]
        rows = some[0].shape[0] if some[0].shape else 0
        most = blocks[0] if blocks else rows
        expected = _block_tensors(i, rows, groups, precision)
        if some != expected or not 0 < rows <= most or (rows < most and start + per_block < len(tensors)):
            raise SnapshotError(
                f"snapshot payload: block {i}: {_shown(some)}, expected {_shown(expected)} of 1 … {most} rows"
            )
        if sum(info.nbytes for info in some) > _MAX_BLOCK_BYTES:
            raise SnapshotError(f"snapshot payload: block {i}: over {_MAX_BLOCK_BYTES} bytes, expected at most that")
        blocks.append(rows)
    return tuple(blocks)


def _block_tensors(i: int, rows: int, groups: Mapping[str, int], precision: Precision) -> list[TensorInfo]:
    infos = [TensorInfo(f"table.keys.{i}", np.dtype("<i8"), (rows,))]
    for name, columns in groups.items():
        dtype = np.dtype({"fp32": "<f4", "fp16": "<f2", "int8": "|i1"}[precision])
        infos.append(TensorInfo(f"table.{name}.{i}", dtype, (rows, columns)))
        if precision == "int8":
            infos.append(TensorInfo(f"table.{name}.scale.{i}", np.dtype("<f4"), (rows,)))
    return infos


def _packed(weights: F32, precision: Precision) -> Iterator[NDArray[Any]]:
    if precision == "fp32":
        yield weights
    elif precision == "fp16":
        largest = np.finfo(np.float16).max  # beyond it there is only infinity
        yield np.clip(weights, -largest, largest).astype(np.float16)
    else:
        scale_N1: F32 = np.abs(weights).max(axis=1, initial=0.0, keepdims=True) / np.float32(127)
        numbers = np.divide(weights, scale_N1, out=np.zeros_like(weights), where=scale_N1 > 0)
        yield np.rint(np.clip(numbers, -127, 127)).astype(np.int8)
        yield scale_N1[:, 0]


def _unpacked(values: NDArray[Any], scale_N: F32 | None) -> F32:
    weights: F32 = values.astype(np.float32, copy=False)
    if scale_N is not None:
        weights *= scale_N[:, None]
    return weights


def _of_equal_length(
    blocks: Iterable[Block], groups: Mapping[str, int], num_rows: int, rows_of_block: int
) -> Iterator[Block]:
    """The same rows in blocks of this length, the last one shorter. Arrays are used again for the next block."""
    length = min(rows_of_block, num_rows)
    keys = np.empty(length, np.int64)
    columns = {name: np.empty((length, c), np.float32) for name, c in groups.items()}
    filled = given = 0
    for some_keys, some_columns in blocks:
        start = 0
        while start < len(some_keys):
            if given + filled == num_rows:
                raise ValueError(f"more than {num_rows} rows, expected that many")
            taken = min(len(some_keys) - start, min(length, num_rows - given) - filled)
            keys[filled : filled + taken] = some_keys[start : start + taken]
            for name, array in columns.items():
                array[filled : filled + taken] = some_columns[name][start : start + taken]
            filled, start = filled + taken, start + taken
            if filled == min(length, num_rows - given):
                yield keys[:filled], {name: array[:filled] for name, array in columns.items()}
                given, filled = given + filled, 0
    if given != num_rows:
        raise ValueError(f"{given + filled} rows, expected {num_rows}")


def _bytes_of(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _checked(call: Callable[[], _T]) -> _T:
    try:
        return call()
    except ValueError as error:
        raise SnapshotError(f"snapshot payload: {error}") from error


def _shown(tensors: list[TensorInfo]) -> str:
    return ", ".join(f"{t.name[:60]} {t.dtype} {list(t.shape)}" for t in tensors[:8])
