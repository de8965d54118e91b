"""Record batches in Kafka that the client cannot decode: damaged ones, and compressions that are not installed.

The consumer raises at such a batch, again and again. Here the batch is fetched as it lies in the log, and tried. Its
header says where it ends, and the next batch's header where that one begins. So the read can go on behind it, and the
batch can be reported.

Some damage stops the broker, too. It answers a fetch by walking from batch to batch, from the last entry of its index
on. Where it trips over a header, it returns an error. Where a header says that the batch ends behind the file, it
returns nothing, without an error. How far that reaches depends on the index (one entry per 4 KiB of log, by default)
and on chance: a batch whose magic byte is damaged is taken for one of an old format, which has the kind of compression
where ours has the first byte of the checksum.

The base offset is not covered by the checksum. If it is damaged, the records are read, and under wrong offsets.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kafka.errors import OffsetOutOfRangeError
from kafka.record.memory_records import MemoryRecords

from stream.log.event_log import TopicPartition, UnreadableRecord

FetchRaw = Callable[[int], tuple[int, bytes]]
"""From an offset to the broker's error code and the batches from there on."""

_OUT_OF_RANGE = int(OffsetOutOfRangeError.errno)
_START = struct.Struct(">qi")  # base offset, length of what follows
_MAGIC_AT, _DELTA_AT, _HEADER_BYTES = 16, 23, 61
_DELTA = struct.Struct(">i")


@dataclass(frozen=True, slots=True)
class _Batch:
    """One record batch: its first offset, the offset after its last one, and its bytes."""

    base: int
    after: int
    data: bytes


def damaged_at(
    at: TopicPartition, position: int, end: int, fetch_raw: FetchRaw, *, stuck: bool = False
) -> list[UnreadableRecord]:
    """The batches from ``position`` on that cannot be decoded, up to the first that can.

    Each report begins where the one before ends, or behind it, and stands for at least one record.

    Args:
        at, position: Where the consumer failed.
        end: The partition's end.
        fetch_raw: Fetches from this partition.
        stuck: The broker has returned nothing from ``position`` on for long, so that another empty answer is damage.
            Without, it is none: a new leader may not know the end yet.
    """
    if position >= end:
        return []
    code, data = fetch_raw(position)
    if code == _OUT_OF_RANGE or not (code or data or stuck):
        return []
    batches = [] if code else list(_batches(data, end))
    if not batches:
        return [_unreachable(at, position, end, fetch_raw, code)]
    found = []
    for batch in batches:
        problem = _problem(batch.data)
        if problem is None:
            break
        first = max(position, batch.base)
        position = max(batch.after, first + 1)  # the broker holds that the first batch reaches at least to `position`
        found.append(_report(at, first, position, problem, batch.data))
    return found


def _batches(data: bytes, end: int) -> Iterator[_Batch]:
    """The complete batches with a header that can be true, one after the other."""
    start, before = 0, -1
    while start + _HEADER_BYTES <= len(data):
        base, length = _START.unpack_from(data, start)
        stop = start + _START.size + length
        if not (before < base < end and _HEADER_BYTES - _START.size <= length and stop <= len(data)):
            return
        told = base + _DELTA.unpack_from(data, start + _DELTA_AT)[0] + 1
        # The end as the batch tells it may look true and be wrong. So the header that follows is asked first.
        follows = stop + _START.size <= len(data)
        ends = (_START.unpack_from(data, stop)[0], told) if follows else (told, end)
        after = next((each for each in ends if base < each <= end), base + 1)
        yield _Batch(base, after, data[start:stop])
        start, before = stop, base


def _problem(data: bytes) -> str | None:
    """Why a batch cannot be decoded; None if it can."""
    try:
        batch = MemoryRecords(data).next_batch()
        if batch is None:
            return "no record batch"
        if not batch.validate_crc():
            return "its checksum is wrong"
        for _ in batch:
            pass
    except Exception as error:  # noqa: BLE001 - damaged bytes may raise anything inside a decoder
        return f"{type(error).__name__}: {error}"
    return None


def _unreachable(at: TopicPartition, position: int, end: int, fetch_raw: FetchRaw, code: int) -> UnreadableRecord:
    """A stretch that the broker itself cannot read: up to an offset from which it can, or to the end.

    That offset is searched in steps that double, and then by halves. If several batches are damaged, what can be read
    between them may be passed and reported with them.
    """

    def readable(offset: int) -> bool:
        error, data = fetch_raw(offset)
        return error == 0 and next(_batches(data, end), None) is not None

    low, step = position, 1
    while low + step < end and not readable(low + step):
        low, step = low + step, 2 * step
    high = min(low + step, end)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if readable(middle) else (middle, high)
    problem = f"the broker cannot read it: error code {code}" if code else "no record batch"
    return _report(at, position, high, problem, b"")


def _report(at: TopicPartition, first: int, after: int, problem: str, data: bytes) -> UnreadableRecord:
    place = f"offset {first}" if after == first + 1 else f"offsets {first} … {after - 1}"
    reason = f"a record batch that cannot be decoded: {problem}"
    return UnreadableRecord(at.topic, at.partition, first, place, reason, data, records=after - first)
