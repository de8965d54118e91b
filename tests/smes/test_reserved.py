"""Arrays that grow in place, and what becomes of them where the system reserves nothing."""

import mmap

import numpy as np
import pytest

from smes.reserved import SMALL_BYTES, ReservedArray


def test_growth_keeps_rows_and_leaves_large_arrays_where_they_are() -> None:
    array, filled, addresses = ReservedArray(np.int32, 5), 0, set()
    for rows in (1, 3, 100, SMALL_BYTES // 20 + 1, 200_000, 900_000):
        array.reserve(rows)
        assert len(array.array) >= rows
        array.array[filled:rows] = np.arange(filled, rows)[:, None]
        filled = rows
        assert np.array_equal(array.array[:rows], np.repeat(np.arange(rows)[:, None], 5, 1))
        if array.in_place:
            addresses.add(array.array.ctypes.data)
    assert array.in_place
    assert len(addresses) == 1
    assert not array.array[900_000:1_000_000].any()


def test_more_than_was_reserved_is_copied() -> None:
    array = ReservedArray(np.int64, largest_bytes=SMALL_BYTES)
    array.reserve(SMALL_BYTES // 8 + 1)
    array.array[:1000] = np.arange(1000)
    before = array.array
    array.reserve(2 * len(before))
    assert len(array.array) >= 2 * len(before)
    assert array.array[:1000].tolist() == before[:1000].tolist() == list(range(1000))


def test_where_nothing_can_be_reserved_arrays_are_ordinary(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    array = ReservedArray(np.float32, 3)
    for rows in (10, 300_000, 500_000):
        array.reserve(rows)
        array.array[rows - 1] = rows
    assert not array.in_place
    assert array.array[[9, 299_999, 499_999], 1].tolist() == [10, 300_000, 500_000]


def test_an_old_view_stays_valid() -> None:
    array = ReservedArray(np.int64)
    array.reserve(500_000)
    view = array.array[:500_000]
    view[:] = 7
    del array
    assert (view == 7).all()
