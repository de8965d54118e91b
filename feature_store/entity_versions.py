"""The stored value of one entity: its last few rows, each with the time from which it holds, newest first.

A version::

    int64   the time from which the row holds, Unix milliseconds; 0: it has always held
    8 bytes id of the row's layout (feature_store.entity_layout)
    uint32  bytes of the row
    the row

all little-endian; a value is one or more versions with descending times, one behind the other. A write goes to its
place by its time, whenever it comes, and replaces a version of the same time. So what is stored in the end does not
depend on the order of the writes, but for those of one entity and one time, of which the last counts.

Letters: N look-ups, U values, V versions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smes.arrays import I8, I64

MAX_VERSIONS = 64
"""Most versions of a value; what is longer is not ours."""

HEADER = np.dtype([("time_ms", "<i8"), ("layout", "<u8"), ("bytes", "<u4")])
"""What stands before a row."""

ABSENT, FOUND, LATER, BROKEN = range(4)
"""What a look-up came to: there is no value; a version holds; there are versions, and all of them are later; the value
cannot be read.
"""

# Puts versions of entities in their places, in one atomic step.
#
# KEYS: the layouts, the mark of the last write, then the entities' values.
# ARGV: how many versions of each entity to keep, id and description of the rows' layout, a mark that no other write
# has, then the entities' versions.
# Returns how many versions were older than all that are kept, and so were dropped.
#
# A value of another kind is replaced. Of a broken value the versions before the fault are kept.
PUT = """
local keep, layout, description = tonumber(ARGV[1]), ARGV[2], ARGV[3]
redis.call('HSETNX', KEYS[1], layout, description)
redis.call('SET', KEYS[2], ARGV[4])
local dropped = 0
for i = 3, #KEYS do
    local version = ARGV[i + 2]
    local time = struct.unpack('<i8', version)
    local value = redis.pcall('GET', KEYS[i])
    if type(value) ~= 'string' then value = '' end
    local kept, count, at, placed = {}, 0, 1, false
    while count < keep do
        local theirs, next_at = nil, nil
        if at + 19 <= #value then
            next_at = at + 20 + struct.unpack('<I4', value, at + 16)
            if next_at <= #value + 1 then theirs = struct.unpack('<i8', value, at) end
        end
        if not placed and (not theirs or time >= theirs) then
            placed = true
            count = count + 1
            kept[count] = version
            if theirs == time then at = next_at end
        elseif theirs then
            count = count + 1
            kept[count] = string.sub(value, at, next_at - 1)
            at = next_at
        else
            break
        end
    end
    if not placed then dropped = dropped + 1 end
    redis.call('SET', KEYS[i], table.concat(kept))
end
return dropped
"""


def version_bytes(rows: NDArray[np.void], time_ms_N: I64, layout_id: bytes) -> list[bytes]:
    """The versions of N rows, one each.

    Args:
        rows: [N], of a layout's type.
        time_ms_N: int64 [N].
        layout_id: 8 bytes.
    """
    out = np.empty(len(rows), np.dtype([("header", HEADER), ("row", rows.dtype)]))
    header = out["header"]
    header["time_ms"] = time_ms_N
    header["layout"] = int.from_bytes(layout_id, "little")
    header["bytes"] = rows.dtype.itemsize
    out["row"] = rows
    packed, width = out.tobytes(), out.dtype.itemsize
    return [packed[start : start + width] for start in range(0, len(packed), width)]


@dataclass(frozen=True)
class Found:
    """Where N look-ups found their rows.

    Attributes:
        outcome: int8 [N], one of ``ABSENT, FOUND, LATER, BROKEN``.
        layout: uint64 [N], id of the found row's layout, its bytes in little-endian order.
        buffer: uint8, all values.
        start: int64 [N], where the row found begins in ``buffer``.
        size: int64 [N], bytes of the row found.
    """

    outcome: I8
    layout: NDArray[np.uint64]
    buffer: NDArray[np.uint8]
    start: I64
    size: I64

    def rows(self, lookups: I64, dtype: np.dtype[np.void]) -> NDArray[np.void]:
        """The rows that these look-ups found; each has as many bytes as ``dtype``."""
        return _records(self.buffer, self.start[lookups], dtype)


def _records(buffer: NDArray[np.uint8], start_N: I64, dtype: np.dtype[np.void]) -> NDArray[np.void]:
    """What begins at these bytes, one record each; all of them lie within the buffer."""
    if not len(start_N):
        return np.empty(0, dtype)
    width = dtype.itemsize
    windows: NDArray[np.uint8] = np.ndarray((len(buffer) - width + 1, width), np.uint8, buffer, strides=(1, 1))
    records: NDArray[np.void] = windows[start_N].reshape(-1).view(dtype)
    return records


def find(values: Sequence[bytes | None], which_N: I64, time_ms_N: I64) -> Found:
    """Find the version that holds at a time: the newest one that is not later.

    Args:
        values: U values; None where there is none.
        which_N: int64 [N], the value that each look-up looks into.
        time_ms_N: int64 [N], Unix milliseconds.
    """
    n, step = len(which_N), HEADER.itemsize
    buffer = np.frombuffer(b"".join([value for value in values if value is not None]), np.uint8)
    ends_U = np.cumsum([0 if value is None else len(value) for value in values], dtype=np.int64)
    end = ends_U[which_N]
    at = np.concatenate([[0], ends_U[:-1]])[which_N] if len(values) else np.zeros(n, np.int64)
    outcome = np.full(n, BROKEN, np.int8)
    layout, size = np.zeros(n, np.uint64), np.zeros(n, np.int64)
    absent_U = np.array([value is None for value in values], np.bool_)
    outcome[absent_U[which_N]] = ABSENT
    open_M = np.flatnonzero(outcome == BROKEN)
    for _ in range(MAX_VERSIONS):
        open_M = open_M[at[open_M] + step <= end[open_M]]
        if not len(open_M):
            break
        header = _records(buffer, at[open_M], HEADER)
        at[open_M] += step
        bytes_M = header["bytes"].astype(np.int64)
        whole = at[open_M] + bytes_M <= end[open_M]
        holds = whole & (header["time_ms"] <= time_ms_N[open_M])
        found = open_M[holds]
        outcome[found] = FOUND
        layout[found] = header["layout"][holds]
        size[found] = bytes_M[holds]
        further = whole & ~holds
        open_M, bytes_M = open_M[further], bytes_M[further]
        at[open_M] += bytes_M
        outcome[open_M[at[open_M] == end[open_M]]] = LATER
    return Found(outcome, layout, buffer, at, size)


def versions(value: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """The versions of a value, newest first: time in Unix milliseconds, layout id, row.

    Raises:
        ValueError: It is broken; the versions before the fault came first.
    """
    at, count = 0, 0
    while at < len(value):
        count += 1
        if count > MAX_VERSIONS or at + HEADER.itemsize > len(value):
            raise ValueError(f"{len(value)} bytes, expected versions of a row")
        header = np.frombuffer(value, HEADER, 1, at)[0]
        at += HEADER.itemsize
        end = at + int(header["bytes"])
        if end > len(value):
            raise ValueError(f"{len(value)} bytes, expected a row of {int(header['bytes'])} at {at}")
        yield int(header["time_ms"]), int(header["layout"]).to_bytes(8, "little"), value[at:end]
        at = end
