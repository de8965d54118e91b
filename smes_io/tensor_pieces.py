"""Safetensors written and read in pieces, so that no more than one tensor is in memory.

A safetensors file is the length of its header (little-endian uint64), the header (a JSON object: name → type, shape and
offsets; ``__metadata__`` → texts) and the tensors one after the other. What is written here has them in the order of
the header; what is read may have its header in any order. Reading trusts nothing: types, shapes and offsets are checked
against the length of the whole before anything is allocated, and a large tensor takes memory only as its bytes arrive.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

MAX_HEADER_BYTES = 8 * 1024 * 1024

LENGTH_BYTES = 8
"""Bytes before the header: its length."""

Piece = bytes | bytearray | memoryview

_METADATA = "__metadata__"
_ALIGNMENT = 8  # the header is padded with spaces to a multiple of it
_AT_ONCE = 64 * 1024 * 1024  # more than this is allocated only as it arrives
_NAMES: dict[str, str] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
_DTYPES = {name: np.dtype(text) for name, text in _NAMES.items()}
_NAME_OF = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file.

    Attributes:
        name: Its name.
        dtype: Its type, little-endian.
        shape: Its dimensions.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, name: str, array: NDArray[Any]) -> "TensorInfo":
        """The tensor that an array is."""
        return cls(name, array.dtype, array.shape)


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: Annotated[list[Annotated[int, Meta(ge=0, le=2**53)]], Meta(max_length=8)]
    data_offsets: tuple[Annotated[int, Meta(ge=0, le=2**53)], Annotated[int, Meta(ge=0, le=2**53)]]


_RAW = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ENTRY = msgspec.json.Decoder(_Entry)
_TEXTS = msgspec.json.Decoder(dict[str, str])


def write_header(tensors: Sequence[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Length and header of a file that holds these tensors one after the other.

    Raises:
        ValueError: Two tensors have one name, a type has no name in safetensors, or the header is too long.
    """
    entries: dict[str, Any] = {_METADATA: dict(metadata)}
    offset = 0
    for tensor in tensors:
        if tensor.name in entries:
            raise ValueError(f"tensor {tensor.name}: two of this name, expected one")
        if tensor.dtype not in _NAME_OF:
            raise ValueError(f"tensor {tensor.name}: {tensor.dtype}, expected one of {', '.join(_DTYPES)}")
        entries[tensor.name] = {
            "dtype": _NAME_OF[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"header of {len(text)} bytes, expected at most {MAX_HEADER_BYTES}")
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def read_header(text: bytes, data_bytes: int) -> tuple[list[TensorInfo], dict[str, str]]:
    """The tensors in the order of their bytes, and the metadata.

    Args:
        text: The header without its length.
        data_bytes: Bytes that come after it.

    Raises:
        ValueError: It is no header, or its tensors do not cover the bytes exactly, without a gap or an overlap.
    """
    try:
        raw = _RAW.decode(text)
        metadata = _TEXTS.decode(raw.pop(_METADATA)) if _METADATA in raw else {}
        entries = sorted(
            ((_ENTRY.decode(entry), name) for name, entry in raw.items()),
            key=lambda found: (found[0].data_offsets, found[1]),
        )
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"header: expected a JSON object of tensors and texts: {error}") from error
    tensors, end = [], 0
    for entry, name in entries:
        if entry.dtype not in _DTYPES:
            raise ValueError(f"tensor {name[:100]}: type {entry.dtype[:20]!r}, expected one of {', '.join(_DTYPES)}")
        tensor = TensorInfo(name, _DTYPES[entry.dtype], tuple(entry.shape))
        if entry.data_offsets != (end, end + tensor.nbytes):
            raise ValueError(
                f"tensor {name[:100]}: at {list(entry.data_offsets)}, expected {[end, end + tensor.nbytes]}"
            )
        end += tensor.nbytes
        tensors.append(tensor)
    if end != data_bytes:
        raise ValueError(f"{data_bytes} bytes after the header, expected {end}")
    return tensors, metadata


class PieceReader:
    """Reads tensors from the pieces of a file, in order; each piece is asked for when it is needed.

    Args:
        pieces: The file, cut anywhere.
        total_bytes: Its length.

    Attributes:
        tensors: Its tensors, in order.
        metadata: Its metadata.

    Raises:
        ValueError: It is no safetensors file of this length.
    """

    def __init__(self, pieces: Iterable[Piece], total_bytes: int) -> None:
        self._pieces: Iterator[Piece] = iter(pieces)
        self._rest = np.zeros(0, np.uint8)
        self._left = total_bytes
        length = int.from_bytes(self._take(LENGTH_BYTES, "header").tobytes(), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"header of {length} bytes, expected at most {MAX_HEADER_BYTES}")
        if length > self._left:
            raise ValueError(f"header cut short ({total_bytes} bytes, header of {length} expected)")
        text = self._take(length, "header").tobytes()
        self.tensors, self.metadata = read_header(text, self._left)

    def read(self, tensor: TensorInfo) -> NDArray[Any]:
        """The values of the next tensor; a new, writable array.

        Raises:
            ValueError: The file is shorter than it said.
        """
        return self._take(tensor.nbytes, f"tensor {tensor.name}").view(tensor.dtype).reshape(tensor.shape)

    def end(self) -> None:
        """Check that nothing is left.

        Raises:
            ValueError: There are more bytes.
        """
        if self._left or len(self._rest) or next(self._pieces, None) is not None:
            raise ValueError("more bytes after the last tensor, expected none")

    def _take(self, count: int, what: str) -> NDArray[np.uint8]:
        """The next bytes, copied. NumPy copies without the interpreter's lock."""
        if count > self._left:
            raise ValueError(f"{what} cut short ({self._left} bytes left, {count} expected)")
        self._left -= count
        taken = np.empty(min(count, _AT_ONCE), np.uint8)
        filled = 0
        while filled < count:
            if not len(self._rest):
                piece = next(self._pieces, None)
                if piece is None:
                    raise ValueError(f"{what} cut short ({filled} bytes, {count} expected)")
                self._rest = np.frombuffer(piece, np.uint8)
                continue
            if filled == len(taken):
                longer = np.empty(min(count, 2 * len(taken)), np.uint8)
                longer[:filled] = taken
                taken = longer
            some = self._rest[: len(taken) - filled]
            taken[filled : filled + len(some)] = some
            filled += len(some)
            self._rest = self._rest[len(some) :]
        return taken
