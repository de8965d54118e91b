"""The PyFlink job of ``examples/flink`` without PyFlink: its join over state in memory, against ours.

``python -m benchmarks.flink_examples`` runs it in Flink, on a real Kafka.
"""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from smes.events import ExampleBlock
from smes.schema import Feature, Schema, Task
from stream.codec.encoders import json_feedback, json_impressions
from stream.config import JoinConfig
from stream.join.joiner import Joiner, join_sources
from stream.joined.records import decode_examples
from stream.log.event_log import Record
from stream.topics import EXAMPLES
from tests.stream.join_reference import feedback_block, impression_block
from tests.stream.test_joined import SCHEMA, slices

_JOB = Path(__file__).resolve().parents[2] / "examples" / "flink" / "join_examples.py"


class MemoryState(dict[Any, Any]):
    """A Flink state in memory: of many keys, or of none."""

    def put(self, key: Any, value: Any) -> None:
        self[key] = value

    def remove(self, key: Any) -> None:
        del self[key]

    def value(self) -> Any:
        return self.get(None)

    def update(self, value: Any) -> None:  # type: ignore[override]  # as Flink's ValueState has it
        self[None] = value


@pytest.fixture(scope="module")
def job() -> SimpleNamespace:
    """The names of the job's module, without what it imports of PyFlink."""
    tree = ast.parse(_JOB.read_text(encoding="utf-8"))
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyflink"))
    ]
    names: dict[str, Any] = {"__name__": "job", "KeyedProcessFunction": object, "MapFunction": object}
    exec(compile(tree, _JOB, "exec"), names)
    return SimpleNamespace(**names)


def examples_of_flink(job: SimpleNamespace, events: list[tuple[str, dict[str, Any]]]) -> ExampleBlock:
    """What the job's join of partition 0 makes of events in this order."""
    of = SimpleNamespace(schema=json.loads(json.dumps(SCHEMA.to_dict())), lateness_s=1.0, remember_s=1e6, vouchers=2)
    join = job.Join(of)
    join.known, join.due, join.clocks = MemoryState(), MemoryState(), MemoryState()
    timers = SimpleNamespace(register_event_time_timer=lambda ms: None)
    context = SimpleNamespace(timer_service=lambda: timers, get_current_key=lambda: 0)

    def records() -> Iterator[tuple[int, bytes]]:
        for topic, event in events:
            yield from join.process_element((topic, 0, event["event_time_ms"] + 3, event), context)
        yield from join.on_timer(0, context)

    head = (("codec", b"arrow"), ("schema", SCHEMA.hash.encode()))
    read = [decode_examples(Record(EXAMPLES, 0, 0, value, head, 0), SCHEMA) for _, value in records()]
    assert not any(each.dead for each in read)
    return ExampleBlock.concat([ExampleBlock.empty(SCHEMA), *(each.examples for each in read)])


def in_one(key: int, time: int) -> int:
    """All events are in partition 0."""
    return 0


def by_id(block: ExampleBlock) -> ExampleBlock:
    """In the order of their impressions."""
    return block.take(np.argsort(block.impression_id))


@pytest.mark.parametrize("seed", range(2))
def test_the_job_makes_the_same_examples(job: SimpleNamespace, seed: int) -> None:
    """Late, duplicate and orphaned events among them, and feedback before its impression."""
    random = Random(seed)
    join = Joiner(SCHEMA, JoinConfig(1.0, 1e6, 2), join_sources(1))
    events: list[tuple[str, dict[str, Any]]] = []
    mine = [ExampleBlock.empty(SCHEMA)]
    for shown, told in slices(random, 120):
        impressions, feedback = impression_block(shown, in_one), feedback_block(told, in_one)
        impressions.ids[:, 2] = impressions.impression_id % 3
        some = [("impressions", event) for event in json_impressions(impressions, SCHEMA)]
        events += [*some, *(("feedback", json.loads(event)) for event in json_feedback(feedback, SCHEMA))]
        mine.append(join.push(impressions, feedback))
    mine.append(join.flush())
    expected, got = map(by_id, (ExampleBlock.concat(mine), examples_of_flink(job, events)))
    assert join.ledger.impressions_late
    assert join.ledger.orphaned
    for name, column in got.arrays().items():
        np.testing.assert_array_equal(column, getattr(expected, name), err_msg=name)


def test_the_job_writes_every_kind_of_column(job: SimpleNamespace) -> None:
    """Bags, numbers, what was served, and what is absent."""
    schema = Schema(
        "kinds",
        tasks=(Task("click", window_s=5), Task("stars", "regression", max_value=5.0, window_s=5)),
        features=(Feature("tab"), Feature("tags", "bag", max_length=3), Feature("price", "numeric")),
    )
    full = {
        "impression_id": 1,
        "user_id": 2,
        "item_id": 3,
        "event_time_ms": 1_700_000_000_000,
        "request_id": 9,
        "features": {"tab": 4, "tags": [5, 6], "price": 1.5},
        "served": {"arm": "main", "version": 7, "scores": {"click": 0.5}},
    }
    bare = {"impression_id": 8, "user_id": 2, "item_id": 3, "event_time_ms": 1_700_000_000_001}
    told = {"stars": {"value": 4.0, "arrival_ms": 11}}
    value = job.as_arrow([(1_700_000_005_000, 1, full, told), (1_700_000_005_001, 8, bare, {})], schema.to_dict())
    head = (("codec", b"arrow"), ("schema", schema.hash.encode()))
    read = decode_examples(Record(EXAMPLES, 1, 0, value, head, 0), schema)
    assert not read.dead
    block, missing = read.examples, np.iinfo(np.int64).min
    assert block.ids.tolist() == [[2, 3, 4, 5, 6, missing], [2, 3, missing, missing, missing, missing]]
    np.testing.assert_array_equal(block.numerics, np.array([[1.5], [np.nan]], np.float32))
    np.testing.assert_array_equal(block.served_scores, np.array([[0.5, np.nan], [np.nan, np.nan]], np.float32))
    assert block.served_version.tolist() == [7, missing]
    assert bytes(block.served_arm[0]).rstrip(b"\0") == b"main"
    assert block.label_mask.tolist() == [[True, True], [True, False]]
    assert block.labels.tolist() == [[0.0, 4.0], [0.0, 0.0]]
    assert block.feedback_arrival_ms.tolist() == [[missing, 11], [missing, missing]]
    assert block.request_id.tolist() == [9, missing]
