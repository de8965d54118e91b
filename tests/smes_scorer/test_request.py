"""Reading a request: what the fast path refuses, the slow one accepts or explains."""

import json
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_store.entities import blank_rows
from smes.hashing import encode_id
from smes.schema import MISSING, Feature, Schema, Task
from smes_scorer.request import FieldError, RequestReader, ScoreRequest, UnreadableBody, nested


@pytest.fixture
def reader(schema: Schema) -> RequestReader:
    return RequestReader(schema, max_items=5)


def read(reader: RequestReader, **request: object) -> ScoreRequest:
    return reader.read(json.dumps({"user_id": 1, "items": [13, 27], **request}).encode())


def refusal(reader: RequestReader, body: bytes) -> FieldError:
    with pytest.raises(FieldError) as caught:
        reader.read(body)
    return caught.value


def test_context_goes_into_every_row(reader: RequestReader, schema: Schema) -> None:
    rows = blank_rows(schema, 1, np.array([13, 27]))
    context = {"hour": 7, "tags": [5, 6, 7], "battery": 2, "seen": [8], "outcomes": [9]}

    read(reader, context=context).write_context(rows)

    expected = [7, 5, 6, 8, MISSING, MISSING, 9, MISSING, MISSING]
    assert rows.ids[:, 3:].tolist() == [expected, expected]
    assert rows.numerics[:, 1].tolist() == [2.0, 2.0]


@given(
    values=st.lists(
        st.integers(MISSING + 1, 2**63 - 1) | st.text(st.characters(codec="utf-8"), min_size=1), min_size=9
    ),
    is_large=st.booleans(),
)
def test_texts_are_ids_as_producers_make_them(values: list[int | str], is_large: bool) -> None:
    reader = RequestReader(
        Schema("s", (Task("click"),), (Feature("hour"), Feature("tags", "bag", max_length=3))), max_items=999
    )
    user, hour, *items = values
    context = {"hour": hour, "tags": items, **({"ignored": "x" * 40_000} if is_large else {})}

    request = reader.read(json.dumps({"user_id": user, "items": items, "context": context}).encode())

    assert request.items == items
    assert request.item_ids.tolist() == [encode_id(item) for item in items]
    assert request.user_id == encode_id(user)
    assert request.ids == {2: [encode_id(hour)], 3: [encode_id(item) for item in items[:3]]}


@pytest.mark.parametrize(
    "context", [{}, {"hour": ""}, {"hour": None, "tags": None, "battery": None, "seen": None}, {"tags": []}]
)
def test_missing_context_writes_nothing(reader: RequestReader, schema: Schema, context: dict[str, object]) -> None:
    rows, untouched = blank_rows(schema, 1, np.array([13])), blank_rows(schema, 1, np.array([13]))

    read(reader, context=context).write_context(rows)

    np.testing.assert_array_equal(rows.ids, untouched.ids)
    np.testing.assert_array_equal(rows.numerics, untouched.numerics)


def test_unknown_context_names_change_nothing_but_their_count(reader: RequestReader) -> None:
    known = read(reader, context={"hour": 7})

    request = read(reader, context={"colour": "blue", "hour": 7, "age": float("nan"), "": None, "\ud800": [{}]})

    assert request.ignored_context == 4
    assert (request.ids, request.numerics) == (known.ids, known.numerics)


def test_of_a_repeated_name_the_last_value_counts(reader: RequestReader) -> None:
    request = reader.read(b'{"user_id": [], "items": [13], "user_id": 3}')

    assert request.user_id == 3


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_every_unicode_encoding_is_read(reader: RequestReader, encoding: str) -> None:
    request = reader.read('{"user_id": 1, "items": [13]}'.encode(encoding))

    assert request.items == [13]


def test_feature_names_need_be_no_identifiers() -> None:
    features = (Feature("a.b"), Feature("tags[1]", "numeric"), Feature("tags", "bag"), Feature("class"))
    reader = RequestReader(Schema("odd", (Task("click"),), features), max_items=5)

    request = read(reader, context={"a.b": 1, "tags[1]": 0.5, "tags": [2, 3], "class": 4})

    assert (request.ids, request.numerics) == ({2: [1], 3: [2, 3], 11: [4]}, {0: 0.5})


@pytest.mark.parametrize(
    ("context", "loc"),
    [
        ({"a.b": []}, ("a.b",)),
        ({"tags[1]": "x"}, ("tags[1]",)),
        ({"tags": [0, 1, ""]}, ("tags", 2)),
        ({"class": 1.0}, ("class",)),
    ],
)
def test_a_wrong_feature_with_an_odd_name_is_named(context: dict[str, object], loc: tuple[object, ...]) -> None:
    features = (Feature("a.b"), Feature("tags[1]", "numeric"), Feature("tags", "bag"), Feature("class"))
    reader = RequestReader(Schema("odd", (Task("click"),), features), max_items=5)

    error = refusal(reader, json.dumps({"user_id": 1, "items": [1], "context": context}).encode())

    assert error.loc == ("body", "context", *loc)


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (b'{"items": [1]}', "missing", "field required"),
        (b"", "missing", "field required"),
        (
            b'{"user_id": 1, "items": [1], "item": 2}',
            "extra_forbidden",
            "expected one of user_id, items, context, top_k, tasks",
        ),
        (b'{"user_id": 1,', "json_invalid", "no JSON: Expecting property name enclosed in double quotes"),
        (b"null", "value_error", "expected an object with user_id and items, got null"),
        (b'{"user_id": 7.5, "items": [1]}', "value_error", "expected an integer or a text, got 7.5"),
        (b'{"user_id": "", "items": [1]}', "value_error", "expected a text that is not empty, got ''"),
        (
            b'{"user_id": "\\ud800", "items": [1]}',
            "value_error",
            r"expected a text without surrogates, got '\ud800'",
        ),
        (b'{"user_id": true, "items": [1]}', "value_error", "expected an integer or a text, got true"),
        (b'{"user_id": 1, "items": []}', "value_error", "expected a list of integers and texts, at least one, got []"),
        (b'{"user_id": 1, "items": 3}', "value_error", "expected a list of integers and texts, at least one, got 3"),
        (
            b'{"user_id": 1, "items": [9223372036854775808]}',
            "value_error",
            "expected an integer from -9223372036854775807 to 9223372036854775807, got 9223372036854775808",
        ),
        (
            b'{"user_id": 1, "items": [1], "context": []}',
            "value_error",
            "expected an object: context feature → value, got []",
        ),
        (
            b'{"user_id": 1, "items": [1], "context": {"tags": 7}}',
            "value_error",
            "expected a list of integers and texts, got 7",
        ),
        (
            b'{"user_id": 1, "items": [1], "context": {"battery": 1e999}}',
            "value_error",
            "expected a finite number, got inf",
        ),
        (b'{"user_id": 1, "items": [1], "top_k": 0}', "value_error", "expected an integer from 1 on, got 0"),
        (b'{"user_id": 1, "items": [1], "tasks": []}', "value_error", "expected a list of tasks, at least one, got []"),
        (
            b'{"user_id": 1, "items": [1], "tasks": ["like", "share"]}',
            "value_error",
            "expected one of click, like, watch_s, got 'share'",
        ),
        (
            b'{"user_id": 1, "items": [1], "tasks": ["like", "like"]}',
            "value_error",
            "expected each task once, got 'like' again",
        ),
        (
            b'{"user_id": 1, "items": [1], "context": {"seen": [1, 2]}}',
            "value_error",
            "expected as many ids as 'seen' has, 2, got 0",
        ),
    ],
)
def test_a_refusal_says_what_was_expected(reader: RequestReader, body: bytes, kind: str, message: str) -> None:
    error = refusal(reader, body)

    assert (error.kind, str(error)) == (kind, message)


def test_a_refusal_quotes_little_of_a_long_value(reader: RequestReader) -> None:
    error = refusal(reader, json.dumps({"user_id": ["x" * 10_000], "items": [1]}).encode())

    assert len(str(error)) < 100


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"user_id": "\xff", "items": [1]}', "expected text in UTF-8"),
        (b"[" * 20_000, r"nested 20000 deep, expected at most 32 \(max_depth\)"),
        (b'{"user_id": 1, "items": [1], "context": {"x": ' + b"[" * 31 + b"]" * 31 + b"}}", "nested 33 deep, expected"),
        (('{"user_id": 1, "items": ' + "[" * 32 + "]" * 32 + "}").encode("utf-16"), "nested 33 deep, expected at most"),
        (b'{"user_id": ' + b"1" * 5000 + b"}", "an integer of thousands of digits"),
    ],
)
def test_a_body_that_cannot_be_parsed(reader: RequestReader, body: bytes, message: str) -> None:
    with pytest.raises(UnreadableBody, match=message):
        reader.read(body)


def test_what_is_ignored_may_be_as_deep_as_allowed(reader: RequestReader) -> None:
    deep = b'{"user_id": 1, "items": [1], "context": {"x": ' + b"[" * 30 + b"]" * 30 + b', "y": "' + b"[" * 99 + b'"}}'

    assert reader.read(deep).ignored_context == 2


VALUES = st.recursive(
    st.none() | st.integers() | st.text(alphabet=r"""[]{}"\a,:é"""),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet=r"""[]{}"\b"""), inner, max_size=3),
    max_leaves=30,
)


def depth_of(value: object) -> int:
    """The depth by definition."""
    if not isinstance(value, list | dict):
        return 0
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max(map(depth_of, inner), default=0)


@given(VALUES, st.booleans())
def test_the_depth_of_a_text_is_that_of_its_value(value: object, ascii_only: bool) -> None:
    assert nested(json.dumps(value, ensure_ascii=ascii_only).encode()) == depth_of(value)


@given(st.binary(max_size=200) | st.text(alphabet='[]{}"\\', max_size=50).map(str.encode))
def test_bytes_that_are_no_json_have_a_depth_too(body: bytes) -> None:
    assert 0 <= nested(body) <= body.count(b"[") + body.count(b"{")


def test_half_a_surrogate_pair_is_refused_in_a_printable_way(reader: RequestReader) -> None:
    error = refusal(reader, b'{"user_id": 1, "items": [1], "\\ud800": 1}')

    assert error.loc == ("body", "\\ud800")


# Large bodies: what is wrong is said in few words and little time, and what is right is read.

MANY = 300_000
LARGE = {
    "strings": b'{"user_id":1,"items":[' + b",".join([b'""'] * MANY) + b"]}",
    "lists": b'{"user_id":1,"items":[' + b",".join([b"[[]]"] * 180_000) + b"]}",
    "objects": b'{"user_id":1,"items":[' + b",".join([b"{}"] * MANY) + b"]}",
    "a wrong one at the end": b'{"user_id":1,"items":[' + b",".join([b"1"] * 400_000) + b',""]}',
    "good texts, too many": b'{"user_id":1,"items":[' + b",".join([b'"x"'] * 200_000) + b"]}",
    "good ones, too many": b'{"user_id":1,"items":[' + b",".join([b"1"] * 450_000) + b"]}",
    "a feature": b'{"user_id":1,"items":[1],"context":{"tags":[' + b",".join([b"{}"] * MANY) + b"]}}",
    "names": b'{"user_id":1,"items":[1],' + b",".join(b'"%06x":1' % i for i in range(90_000)) + b"}",
    "one name": b'{"user_id":1,"items":[1],"' + b"n" * 900_000 + b'":1}',
    "half surrogates": b'{"user_id":1,"items":[1],"' + b"\\ud800" * 150_000 + b'":1}',
    "nested": b'{"a":' * 150_000,
    "a list": b"[" + b",".join([b"{}"] * MANY) + b"]",
    "not closed": b'{"user_id":1,"items":[' + b",".join([b'""'] * MANY),
    "digits": b'{"user_id":' + b"9" * 900_000 + b',"items":[1]}',
    "no text": b"\xff" * 900_000,
    "32 KiB of lists": b'{"user_id":1,"items":[' + b",".join([b"[[]]"] * 6500) + b"]}",
}


@pytest.mark.parametrize("body", LARGE.values(), ids=LARGE.keys())
def test_a_large_wrong_body_is_refused_in_few_words_and_little_time(reader: RequestReader, body: bytes) -> None:
    took_s, refusals = [], list[ValueError]()
    for _ in range(5):
        begun_s = time.thread_time()
        with pytest.raises((FieldError, UnreadableBody)) as caught:
            reader.read(body)
        took_s.append(time.thread_time() - begun_s)
        refusals.append(caught.value)

    assert min(took_s) < 0.05  # of the processor, whatever else the machine does
    assert len(str(refusals[0])) + len(str(getattr(refusals[0], "loc", ""))) < 400


@pytest.mark.parametrize(
    ("name", "loc", "message"),
    [
        ("strings", ("body", "items", 0), "expected an integer or a text"),
        ("a wrong one at the end", ("body", "items", 400_000), "expected an integer or a text"),
        ("good ones, too many", ("body", "items"), "450000 items, expected at most 5"),
        ("a feature", ("body", "context", "tags", 0), "expected an integer or a text"),
        ("names", ("body", "000000"), "expected one of user_id, items, context, top_k, tasks"),
        ("a list", ("body",), "expected an object with user_id and items"),
    ],
)
def test_a_large_wrong_body_is_refused_with_the_place(
    reader: RequestReader, name: str, loc: tuple[object, ...], message: str
) -> None:
    error = refusal(reader, LARGE[name])

    assert (error.loc, str(error)) == (loc, message)


def test_a_large_body_without_a_field_says_which(reader: RequestReader) -> None:
    error = refusal(reader, b'{"user_id":1,"context":{"zz":"' + b"x" * 100_000 + b'"}}')

    assert (error.loc, error.kind) == (("body", "items"), "missing")


def test_a_large_good_request_with_names_to_ignore_is_read(reader: RequestReader) -> None:
    ignored = b",".join(b'"n%06d":[{}]' % i for i in range(9000))

    request = reader.read(b'{"user_id":1,"items":[13],"context":{"hour":7,' + ignored + b"}}")

    assert (request.items, request.ignored_context) == ([13], 9000)
    assert request.ids == read(reader, context={"hour": 7}).ids
