"""Records whose impressions share what their request has: the same events as one by one, in JSON and in Arrow.

Guarantee shown: such a record decodes to what its impressions would decode to if each said everything itself; what
contradicts itself, or cannot be read, has a letter with its reason; nothing is lost or counted twice, over restarts,
replays and damage.
"""

import copy
import json
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from smes.events import ImpressionBlock
from smes.schema import MISSING, Feature, Schema, Task
from stream.codec.codec import Codec, Decoded, encode_impressions
from stream.codec.json_records import json_records
from stream.codec.limits import MAX_ROWS
from stream.codec.record_headers import MAX_BYTES
from stream.codec.single import single_event
from stream.dead_letter_replay import Replayer
from stream.dead_letters import DeadLetterWriter
from stream.example_stream import ExampleStream
from stream.log.event_log import Headers, OutRecord
from stream.topics import IMPRESSIONS, partition_of
from tests.stream.refused_events import CONFIG, SCHEMA, START_MS, Reader, World, append_good, letters_in
from tests.stream.test_codec_bounds import memory_within
from tests.stream.wire import ARRIVAL_MS, MakeRecord, assert_same_events, decode, ipc

IDS = st.sampled_from([1, 2, None, MISSING])
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "user_id": IDS,
    "item_id": IDS,
    "event_time_ms": st.sampled_from([ARRIVAL_MS, ARRIVAL_MS - 1, None, 5]),
    "request_id": IDS,
    "features.tab": IDS,
    "features.tags": st.sampled_from([None, [], [1], [1, 2], [1, 2, 3, 4, 5], [1, MISSING]]),
    "features.price": st.sampled_from([None, 1.5, 2.5, 1e39]),
    "features.odd": st.sampled_from([None, 1]),
    "served_version": IDS,
    "served_scores": st.sampled_from([None, [0.5, None, None], [0.5, 0.25, 1.0]]),
    "served_arm": st.sampled_from([None, "main", "b"]),
}
TYPES = {
    "features.tags": pa.list_(pa.int64()),
    "features.price": pa.float64(),
    "served_scores": pa.list_(pa.float32()),
    "served_arm": pa.string(),
}


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[int | None]]:
    """Columns of impressions, columns that requests have for theirs, and whose each impression is."""
    shared = draw(st.sets(st.sampled_from(list(VALUES))))
    own = draw(st.sets(st.sampled_from(list(VALUES))))
    if draw(st.booleans()):
        own -= shared  # else both have it
    own |= {"user_id", "item_id", "event_time_ms"} - shared  # a column must be in one of the places
    given_R = draw(st.lists(st.fixed_dictionaries({n: VALUES[n] for n in sorted(shared)}), min_size=1, max_size=3))
    shown_N = draw(st.lists(st.fixed_dictionaries({n: VALUES[n] for n in sorted(own)}), min_size=3, max_size=6))
    of_N = draw(st.lists(st.none() | st.integers(0, len(given_R) - 1), min_size=len(shown_N), max_size=len(shown_N)))
    return [{"impression_id": i, **each} for i, each in enumerate(shown_N)], given_R, of_N


def in_json(columns: dict[str, Any], schema: Schema) -> dict[str, Any]:
    event: dict[str, Any] = {n: v for n, v in columns.items() if "." not in n and not n.startswith("served")}
    event["features"] = {n[9:]: v for n, v in columns.items() if n.startswith("features.")}
    event["served"] = {n[7:]: v for n, v in columns.items() if n.startswith("served_")}
    if event["served"].get("scores"):
        event["served"]["scores"] = dict(zip(schema.task_index, event["served"]["scores"], strict=True))
    return event


def cut(value: Any) -> Any:
    return value[:3] if isinstance(value, list) and isinstance(value[0], int) else value


def merged(own: dict[str, Any], given: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """An impression that says everything itself, and the first field of which its request says something else."""
    whole, differs = dict(own), None
    for name in [name for name in VALUES if name in given]:
        if own.get(name) in (None, []):
            whole[name] = given[name]
        elif given[name] not in (None, []) and cut(own[name]) != cut(given[name]) and name != "features.odd":
            differs = differs or name
    return whole, differs


_SHOWN = [{"impression_id": i, "user_id": 1, "item_id": 1, "features.tags": [1, 2]} for i in range(3)]
_GIVEN = {"event_time_ms": ARRIVAL_MS, "user_id": 1, "features.tags": [1, 2], "served_scores": [0.5, None, None]}


@given(made=requests())
@example(made=(_SHOWN, [_GIVEN, _GIVEN | {"user_id": 2}, _GIVEN | {"features.tags": [1]}], [0, 1, 2]))
def test_json_and_arrow_agree_with_impressions_that_say_everything_themselves(
    made: Any, wire_schema: Schema, as_record: MakeRecord, arrow_headers: Headers
) -> None:
    shown_N, given_R, of_N = made
    alone = [merged(own, given_R[of] if of is not None else {}) for own, of in zip(shown_N, of_N, strict=True)]
    values = [json.dumps(in_json(columns, wire_schema)).encode() for columns, _ in alone]
    expected = decode([as_record(IMPRESSIONS, v, i) for i, v in enumerate(values)], wire_schema)
    fates = {letter.offset: letter.code for letter in expected.dead}
    fates |= {i: "conflict" for i, (_, name) in enumerate(alone) if name and i not in fates}
    # The fault of what is shared comes first: that of a good impression which has it.
    good_own = {"impression_id": 1, "user_id": 1, "item_id": 1, "event_time_ms": ARRIVAL_MS}
    shared = [json.dumps(in_json(merged({**given, "impression_id": 1}, good_own)[0], wire_schema)) for given in given_R]
    faults = decode([as_record(IMPRESSIONS, v.encode(), i) for i, v in enumerate(shared)], wire_schema)
    codes = {letter.offset: letter.code for letter in faults.dead}
    fates |= {i: codes[of] for i, of in enumerate(of_N) if of in codes}
    good = expected.impressions.take(~np.isin(expected.impressions.impression_id, list(fates)))

    records = []
    for number, given_columns in enumerate([*given_R, None]):
        members = [
            own for own, of in zip(shown_N, of_N, strict=True) if of == (number if given_columns is not None else None)
        ]
        if given_columns is not None and members:
            event = {**in_json(given_columns, wire_schema), "impressions": [in_json(m, wire_schema) for m in members]}
            records.append(as_record(IMPRESSIONS, json.dumps(event).encode(), number))
        elif members:
            records += [as_record(IMPRESSIONS, json.dumps(in_json(m, wire_schema)).encode(), 9) for m in members]
    by_json = decode(records, wire_schema)

    by_id = np.argsort(by_json.impressions.impression_id)
    assert_same_events(by_json.impressions.take(by_id), good)
    assert len(by_json.impressions) + by_json.dead_impressions == len(shown_N)

    names = {name: TYPES.get(name, pa.int64()) for name in ["impression_id", *VALUES]}
    arrow = {n: pa.array([own[n] for own in shown_N], names[n]) for n in names if n in shown_N[0]}
    struct = pa.array(given_R, pa.struct([(n, names[n]) for n in given_R[0]]))
    arrow["request"] = pa.DictionaryArray.from_arrays(pa.array(of_N, pa.int8()), struct)
    by_arrow = decode([as_record(IMPRESSIONS, ipc(arrow), headers=arrow_headers)], wire_schema)

    assert_same_events(by_arrow.impressions, good)
    assert by_arrow.dead_impressions == len(fates)
    assert {letter.row: letter.code for letter in by_arrow.dead} == fates
    # The payload is the event in JSON, refused for the same reason.
    again = decode([as_record(IMPRESSIONS, each.payload, each.row) for each in by_arrow.dead], wire_schema)
    assert {letter.offset: letter.code for letter in again.dead} == fates
    assert by_json.unknown_fields == by_arrow.unknown_fields or "features.odd" in given_R[0]


def world_block(schema: Schema, n: int) -> ImpressionBlock:
    """Requests of 1 … 5 impressions: features of the user and of the context are the same in each, others differ."""
    rng = np.random.default_rng(n)
    block = ImpressionBlock.empty(schema, n)
    of = np.repeat(np.arange(n), rng.integers(1, 6, n))[:n]
    block.impression_id[:] = rng.permutation(n) + 1
    block.request_id[:] = np.where(of % 7 == 3, MISSING, of)
    block.event_time_ms[:] = ARRIVAL_MS - 10 * (n - of)
    values = rng.integers(1, 9, block.ids.shape)
    block.ids[:] = np.where(rng.random(block.ids.shape) < 0.2, MISSING, values)
    tags = schema.id_slices["tags"]
    block.ids[:, tags] = np.sort(block.ids[:, tags], axis=1)[:, ::-1]  # bags are filled from the left
    block.ids[:, 1] = values[:, 1]
    for columns in (slice(0, 1), slice(2, 3), tags):
        block.ids[:, columns] = block.ids[of, columns]
    block.ids[:, 0] = values[of, 0]
    block.numerics[:] = rng.random(block.numerics.shape)
    block.numerics[::3] = np.nan
    block.numerics[:, 0] = block.numerics[of, 0]
    block.served_version[:] = np.where(of % 2, 12, MISSING)
    block.served_scores[::2] = 0.5
    block.served_arm[of % 2 == 1, :4] = np.frombuffer(b"main", np.uint8)
    return block


@pytest.mark.parametrize("codec", ["json", "arrow"])
def test_what_is_sent_by_request_comes_back_row_for_row_and_is_smaller(
    codec: Codec, wire_schema: Schema, as_record: MakeRecord
) -> None:
    block = world_block(wire_schema, 500)
    sizes = []
    for by_request in (False, True):
        made = encode_impressions(block, wire_schema, codec, 3, by_request=by_request)
        sizes.append(sum(len(out.value) for out in made))
        decoded = decode(
            [as_record(IMPRESSIONS, o.value, i, o.headers, o.partition) for i, o in enumerate(made)], wire_schema
        )
        assert (decoded.dead, decoded.unknown_fields) == ([], 0)
        for partition in range(3):
            expected = block.take(partition_of(block.impression_id, 3) == partition)
            got = decoded.impressions.take(decoded.impressions.partition == partition)
            assert_same_events(got, expected)
    assert sizes[1] < 0.9 * sizes[0]


def test_a_request_that_one_record_cannot_hold_is_sent_in_several(as_record: MakeRecord) -> None:
    schema = Schema("wide", (Task("click"),), (Feature("tags", "bag", max_length=1_000),))
    block = ImpressionBlock.empty(schema, 100)
    block.impression_id[:] = block.ids[:, 1] = np.arange(100) + 1
    block.ids[:, 0] = block.request_id[:] = 1
    block.event_time_ms[:] = ARRIVAL_MS
    block.ids[:, 2:] = 2**62 + np.arange(100)[:, None]
    made = encode_impressions(block, schema, "json", 1, by_request=True)
    decoded = decode([as_record(IMPRESSIONS, o.value, i, o.headers) for i, o in enumerate(made)], schema)
    assert 1 < len(made) < 5
    assert decoded.dead == []
    assert_same_events(decoded.impressions, block)


def test_impressions_as_large_as_a_record_may_be_are_sent_as_they_are(wire_schema: Schema) -> None:
    events = [{"impression_id": i, "request_id": 5, "features": {"tab": i, "text": ""}} for i in (1, 2)]
    room = MAX_BYTES["json"] - len(msgspec.json.encode(events[0]))
    for each in events:
        each["features"]["text"] = "x" * room  # type: ignore[index]
    expected = copy.deepcopy(events)
    made, record_N = json_records(events, np.zeros(2, np.int32), wire_schema, by_request=True)
    assert [json.loads(out.value) for out in made] == expected
    assert ([len(out.value) for out in made], record_N.tolist()) == ([MAX_BYTES["json"]] * 2, [0, 1])


def request(ids: range, **changes: Any) -> dict[str, Any]:
    """A good request in JSON, without a schema, with some fields changed; all impressions are of one partition."""
    shown: list[Any] = [{"impression_id": i, "item_id": i} for i in ids]
    given_fields = {"request_id": ids[0], "user_id": ids[0], "event_time_ms": START_MS + 100 * ids[0]}
    return {**given_fields, "impressions": shown, **changes}


def as_out(event: Any, partition: int = 0) -> OutRecord:
    return OutRecord(json.dumps(event).encode(), (("codec", b"json"),), partition)


FUTURE_MS = START_MS + 10_000_000 + 2 * 86_400_000


def test_bad_impressions_of_good_requests_over_a_restart_a_replay_and_an_audit(world: World) -> None:
    append_good(world.log, range(40))
    odd = request(range(100, 104), user_id=None)
    odd["impressions"] = [
        {"impression_id": 100, "item_id": 1, "user_id": 5},
        {"impression_id": 101, "item_id": 1},  # whose?
        {"impression_id": 102, "item_id": 1, "user_id": 5, "event_time_ms": START_MS},  # when?
        {"impression_id": 103, "item_id": "x" * 3000, "user_id": 5},
        7,
    ]
    later = request(range(110, 113), event_time_ms=None)
    for i, each in enumerate(later["impressions"]):
        each["event_time_ms"] = FUTURE_MS if i == 1 else START_MS + 4_000
    escaped = json.dumps(request(range(120, 123))).replace('"impressions"', '"\\u0069mpressions"').encode()
    made = [
        as_out(odd),
        as_out(later),
        as_out(request(range(115, 118), event_time_ms=FUTURE_MS)),
        OutRecord(escaped, (("codec", b"json"),), 1),
        as_out(request(range(125, 128), user_id="x")),
        as_out(request(range(130, 133), impressions=[])),
        as_out(request(range(130, 133), impressions=5)),
        as_out({"impression_id": 140, "user_id": 1, "item_id": 1, "event_time_ms": START_MS + 4_000, "impressions": 3}),
    ]
    world.log.append(IMPRESSIONS, made)
    now_ms = [START_MS + 10_000_000]

    def reader() -> Reader:
        made = Reader(world.another())
        letters = DeadLetterWriter(made.log)
        made.stream = ExampleStream(SCHEMA, CONFIG, made.log, letters, now_ms=lambda: now_ms[0])
        return made

    first = reader()
    first.read_all()
    second = reader()  # the same again, as after a restart before the first checkpoint
    second.read_all()

    for each in (first, second):
        result = each.audit()
        assert result.balanced, result.imbalances
        ledger = each.stream.ledger()
        assert (ledger.impressions, ledger.dead_lettered, ledger.unknown_fields) == (
            40 + 5 + 3 + 3 + 3 + 3 + 1 + 1 + 1,
            4 + 1 + 3 + 3 + 1 + 1,
            1,
        )
    letters = {stored.id: stored.letter for stored in letters_in(world.log)}
    assert len(letters_in(world.log)) == 2 * len(letters)
    fates = sorted(
        (each.offset, -1 if each.row is None else each.row, each.code, each.events) for each in letters.values()
    )
    base = min(offset for offset, *_ in fates)
    assert [(offset - base, *rest) for offset, *rest in fates] == [
        (0, 1, "missing_field", 1),
        (0, 2, "conflict", 1),
        (0, 3, "bad_id", 1),
        (0, 4, "unparsable", 1),
        (1, 1, "bad_time", 1),
        (2, -1, "bad_time", 3),
        (3, -1, "bad_id", 3),
        (4, -1, "missing_field", 1),
        (5, -1, "bad_type", 1),
    ]
    [cut_off] = [each for each in letters.values() if each.code == "bad_id" and each.row is not None]
    assert cut_off.payload.startswith(b'{"impressions":[{"impression_id": 103')

    now_ms[0] = FUTURE_MS
    outcome = Replayer(world.another(), SCHEMA, now_ms=lambda: now_ms[0]).run()
    assert (outcome.appended, outcome.events) == (2, 1 + 3)
    assert outcome.refused == {"missing_field": 2, "conflict": 1, "bad_id": 2, "unparsable": 1, "bad_type": 1}
    second.read_all(flush=True)
    assert {100, 110, 111, 112, 115, 116, 117, 120, 121, 122, 140} == set(second.labels) - set(range(40))
    assert second.audit().balanced


@pytest.mark.parametrize("codec", ["json", "arrow"])
def test_a_restart_in_the_middle_of_a_record_goes_on_with_the_very_next_batch(codec: Codec, log: Any) -> None:
    """A record of 25 impressions is more than two batches of 10."""
    block = ImpressionBlock.empty(SCHEMA, 100)
    block.impression_id[:] = block.ids[:, 1] = np.arange(100)
    block.ids[:, 0] = block.request_id[:] = 1 + np.arange(100) // 25
    block.event_time_ms[:] = START_MS + 100_000 * block.request_id
    made = encode_impressions(block, SCHEMA, codec, 1, by_request=True)
    assert len(made) == (4 if codec == "json" else 1)
    log.append(IMPRESSIONS, made)

    def stream() -> ExampleStream:
        return ExampleStream(SCHEMA, CONFIG, log, DeadLetterWriter(log), now_ms=lambda: FUTURE_MS)

    def batches(of: ExampleStream) -> Iterator[tuple[list[int], Any]]:
        while (batch := of.next_batch()) is not None:
            yield batch.impression_id.tolist(), {name: array.copy() for name, array in of.state().items()}

    whole = stream()
    whole.poll(1.0)
    whole.flush()
    expected = list(batches(whole))
    assert [len(ids) for ids, _ in expected] == [10] * 10
    for number, (_, state) in enumerate(expected):
        again = stream()
        again.load_state(state)
        assert [ids for ids, _ in batches(again)] == [ids for ids, _ in expected[number + 1 :]]
        assert again.poll(0) == 0


# Bounds.


def test_letters_of_a_large_request_take_no_more_than_a_few_times_its_size(
    wire_schema: Schema, as_record: MakeRecord
) -> None:
    shown = [{"impression_id": i, "item_id": "?"} for i in range(5_000)]
    event = {"user_id": 1, "event_time_ms": ARRIVAL_MS, "note": "x" * 700_000, "impressions": shown}
    value = json.dumps(event).encode()
    with memory_within(100):
        decoded = decode([as_record(IMPRESSIONS, value)], wire_schema)
    assert len(decoded.dead) == 5_000
    assert sum(len(letter.payload) for letter in decoded.dead) <= 6 * len(value)
    assert all(letter.is_excerpt for letter in decoded.dead)


def test_a_row_by_itself_has_what_its_own_request_shares_and_nothing_of_others(
    wire_schema: Schema, as_record: MakeRecord
) -> None:
    block = world_block(wire_schema, 1_000)
    [out] = encode_impressions(block, wire_schema, "arrow", 1, by_request=True)
    record = as_record(IMPRESSIONS, out.value, headers=out.headers)
    for row in (0, 1, 500, 999):
        value = single_event(record, row)
        assert len(value) < len(out.value) / 10
        assert_same_events(
            decode([as_record(IMPRESSIONS, value, headers=out.headers)], wire_schema).impressions,
            block.take(np.array([row])),
        )


def test_a_request_of_too_many_impressions_is_refused_with_their_number(as_record: MakeRecord) -> None:
    schema = Schema("long", (Task("click"),), (Feature("tags", "bag", max_length=1_000),))
    event = {"user_id": 1, "impressions": [{}] * 20_000}
    decoded = decode([as_record(IMPRESSIONS, json.dumps(event).encode())], schema)
    assert [(letter.code, letter.events) for letter in decoded.dead] == [("too_large", 20_000)]


def columns(n: int) -> dict[str, Any]:
    return {"impression_id": pa.array(np.arange(n)), "item_id": pa.array(np.arange(n))}


def given_by(fields: dict[str, Any], of: Any) -> Any:
    struct = pa.StructArray.from_arrays(list(fields.values()), list(fields))
    return pa.DictionaryArray.from_arrays(of, struct)


def test_requests_that_cost_no_bytes_are_refused_in_little_memory(
    wire_schema: Schema, as_record: MakeRecord, arrow_headers: Headers
) -> None:
    n = 2_000_000_000
    given_R = pa.nulls(n, pa.struct([("user_id", pa.null()), ("features.tags", pa.list_(pa.null()))]).field(0).type)
    struct = pa.StructArray.from_arrays([given_R], ["user_id"])
    value = ipc(columns(2) | {"request": pa.DictionaryArray.from_arrays(pa.array([0, n - 1], pa.int32()), struct)})
    tags = pa.ListArray.from_arrays(pa.array([0, 2**31 - 2, 2**31 - 2], pa.int32()), pa.nulls(2**31 - 2))
    times = pa.array([ARRIVAL_MS] * 2)
    fields = {"user_id": pa.array([1, 2]), "event_time_ms": times, "features.tags": tags}
    nulls = ipc(columns(2) | {"request": given_by(fields, pa.array([0, 1], pa.int8()))})
    assert len(value) + len(nulls) < 10_000

    with memory_within(100):
        decoded = [decode([as_record(IMPRESSIONS, v, headers=arrow_headers)], wire_schema) for v in (value, nulls)]

    assert [(letter.code, letter.row) for letter in decoded[0].dead] == [("too_large", None)]
    assert [(letter.code, letter.row) for letter in decoded[1].dead] == [("bad_id", 0)]


@pytest.mark.parametrize(
    ("column", "code"),
    [
        (pa.array([1, 2]), "bad_type"),
        (pa.array([{"user_id": 1}, {"user_id": 1}]), "bad_type"),
        (pa.array(["a", "b"]).dictionary_encode(), "bad_type"),
        (given_by({"user_id": pa.array(["x", "y"])}, pa.array([0, 1])), "bad_id"),
        (given_by({"user_id": pa.array([1, 2]).dictionary_encode()}, pa.array([0, 1])), "bad_type"),
        (given_by({"features.tab": pa.array([[[1]], []])}, pa.array([0, 1])), "bad_type"),
        (given_by({"user_id": pa.nulls(2)}, pa.array([0, 1])), "missing_field"),
        (pa.nulls(2), "missing_field"),
        (given_by({}, pa.array([], pa.int8())), None),
    ],
)
def test_columns_of_requests_that_are_none(
    column: Any, code: str | None, wire_schema: Schema, as_record: MakeRecord, arrow_headers: Headers
) -> None:
    if code is None:
        column = pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int8()), pa.array([{}, {}], pa.struct([])))
        code = "missing_field"
    value = ipc(columns(2) | {"request": column, "event_time_ms": pa.array([ARRIVAL_MS] * 2)})
    decoded = decode([as_record(IMPRESSIONS, value, headers=arrow_headers)], wire_schema)
    assert [(letter.code, letter.events) for letter in decoded.dead] == [(code, 2)]


@given(
    patches=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=4)), min_size=1, max_size=4
    )
)
def test_damaged_records_lose_nothing_and_never_raise(
    patches: list[tuple[float, bytes]], wire_schema: Schema, as_record: MakeRecord, arrow_headers: Headers
) -> None:
    block = world_block(wire_schema, 12)
    for codec, head in (("json", ()), ("arrow", arrow_headers)):
        for out in encode_impressions(block, wire_schema, codec, 1, by_request=True):  # type: ignore[arg-type]
            value = bytearray(out.value)
            for where, patch in patches:
                start = int(where * (len(value) - 8 - len(patch)))
                value[start : start + len(patch)] = patch
            decoded: Decoded = decode([as_record(IMPRESSIONS, bytes(value), 0, head)], wire_schema)
            assert len(decoded.impressions) + decoded.dead_impressions > 0
            assert len(decoded.impressions) <= MAX_ROWS
