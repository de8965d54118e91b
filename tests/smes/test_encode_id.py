"""The rule for ids, written out: which texts are integers, and to the byte what the others become."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smes.hashing import encode_id, stable_id

LARGEST = 2**63 - 1


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0", 0),
        ("-0", 0),
        ("-0.0", 0),
        ("7", 7),
        ("-7", -7),
        ("29.0", 29),
        (str(LARGEST), LARGEST),
        (f"-{LARGEST}.0", -LARGEST),
        (29, 29),
        (29.0, 29),
        (-0.0, 0),
        (True, 1),
        (np.int64(5), 5),
        (np.float64(5), 5),
    ],
)
def test_what_is_written_as_an_integer_is_one(value: str | float, expected: int) -> None:
    assert encode_id(value) == expected


TEXTS = (
    *("1e2", "10e1", "0100", "+100", "1_00", "01e2", "100.", "100.00", ".0", " 100", "100 ", "100\n", "0x64", "1,00"),
    *("--1", "-", "", " ", "nan", "NaN", "NULL", "None", "١٠٠", "１００", "100\0", "é", "e\u0301"),
    *(str(LARGEST + 1), str(-LARGEST - 1), "9" * 5000),
)


@pytest.mark.parametrize("text", TEXTS)
def test_every_other_text_is_hashed_as_it_stands(text: str) -> None:
    """BLAKE2b with a digest of eight bytes over the UTF-8 bytes; little-endian; without the lowest bit."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    assert encode_id(text) == int.from_bytes(digest, "little") // 2
    assert 0 <= encode_id(text) <= LARGEST


def test_numbers_that_are_no_int64_are_the_text_that_they_print() -> None:
    assert encode_id(2**63) == stable_id("9223372036854775808")
    assert encode_id(-(2**63)) == stable_id("-9223372036854775808")
    assert encode_id(0.5) == encode_id(np.float64(0.5)) == stable_id("0.5")


@pytest.mark.parametrize("value", [2.0**53, -(2.0**60), float("nan"), float("inf")])
def test_a_float_that_may_have_been_another_integer_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"expected a double below 2\^53, an integer or a text"):
        encode_id(value)


def test_a_text_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a text without surrogates"):
        encode_id("user-\ud800")


@given(st.integers(-LARGEST, LARGEST))
def test_an_integer_is_its_own_id_however_it_is_held(value: int) -> None:
    assert encode_id(value) == encode_id(str(value)) == encode_id(f"{value}.0") == value


@pytest.mark.parametrize(("text", "digest"), [("c17", "edd2393a04d1306d"), ("café", "5777a2bd3192d7e3")])
def test_another_program_finds_the_same_id(text: str, digest: str) -> None:
    """The digests are what ``printf c17 | b2sum --length 64`` prints."""
    swapped = int("".join(reversed([digest[i : i + 2] for i in range(0, 16, 2)])), 16)
    assert encode_id(text) == swapped >> 1


def test_the_page_tells_other_languages_the_same_ids() -> None:
    page = (Path(__file__).parents[2] / "docs/reference/schema-file.md").read_text(encoding="utf-8")
    rows = re.findall(r'^\| (.*"(.+?)".*) \| (\d+) \|$', page.split("## Ids to the byte")[1], re.MULTILINE)
    assert len(rows) == 6
    for _, text, expected in rows:
        assert encode_id(text) == int(expected)
