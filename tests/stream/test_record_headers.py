"""Record headers as bytes, for Redis Streams, which have no headers."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.log.redis_entries import pack_headers, unpack_headers


@given(st.lists(st.tuples(st.text(max_size=300), st.binary(max_size=300)), max_size=6))
def test_unpacking_gives_back_what_was_packed(headers: list[tuple[str, bytes]]) -> None:
    assert unpack_headers(pack_headers(tuple(headers))) == tuple(headers)


def test_the_bytes_are_message_pack() -> None:
    # By the MessagePack specification: 0x9n array of n, 0xan text of n bytes, 0xc4 n bytes of length n.
    packed = pack_headers((("ab", b"xyz"), ("c", b"")))

    assert packed == b"\x92" + b"\x92\xa2ab\xc4\x03xyz" + b"\x92\xa1c\xc4\x00"


@pytest.mark.parametrize("size", range(len(pack_headers((("codec", b"json"),)))))
def test_cut_bytes_are_refused_wherever_they_are_cut(size: int) -> None:
    data = pack_headers((("codec", b"json"),))

    with pytest.raises(ValueError, match=f"headers of {size} bytes: expected MessagePack"):
        unpack_headers(data[:size])


@pytest.mark.parametrize(
    "data",
    [
        pack_headers(()) + b"x",
        msgspec.msgpack.encode({"codec": b"json"}),
        msgspec.msgpack.encode([["codec", "text"]]),
        msgspec.msgpack.encode([["codec"]]),
        b"\x91\x92\xa1\xff\xc4\x00",  # a name that is not UTF-8
        b"\x05codec\x04\x00\x00\x00json",
    ],
)
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"expected MessagePack \[\[name, bytes\], …\]"):
        unpack_headers(data)
