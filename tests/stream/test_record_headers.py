import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.log.redis_log import pack_headers, unpack_headers

NAMES = st.text(max_size=60)


@given(st.lists(st.tuples(NAMES, st.binary(max_size=300)), max_size=6))
def test_unpacking_gives_back_what_was_packed(headers: list[tuple[str, bytes]]) -> None:
    assert unpack_headers(pack_headers(tuple(headers))) == tuple(headers)


def test_the_bytes_are_as_documented() -> None:
    assert pack_headers(()) == b""
    assert pack_headers((("ab", b"xyz"), ("c", b""))) == b"\x02ab\x03\x00\x00\x00xyz\x01c\x00\x00\x00\x00"


def test_cut_bytes_are_refused_wherever_they_are_cut() -> None:
    data = pack_headers((("codec", b"json"),))
    for size in range(1, len(data)):
        with pytest.raises(ValueError, match="end inside"):
            unpack_headers(data[:size])


def test_a_name_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="name of 256 bytes"):
        pack_headers((("n" * 256, b""),))
