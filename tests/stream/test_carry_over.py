"""The join across a change of the schema, against a join that has had the new schema from the start."""

from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from smes.events import CLOSING, ExampleBlock
from smes.schema import Feature, Schema, Task
from smes.schema_change import NEW, Renames, SchemaChange
from stream.carry_over import carry_over_stream
from stream.config import JoinConfig, MiniBatchConfig
from stream.join.joiner import join_sources
from stream.join.waits import Correction, Wait
from stream.mini_batches import Assembler
from tests.stream.join_reference import PARTITIONS, SCHEMA, Feedback, Impression, feedback_block, impression_block
from tests.stream.test_delayed_join import CORRECTIONS, _events

NOW = Schema(
    name="after",
    features=(
        Feature("cost", kind="numeric"),
        Feature("tags", kind="bag", max_length=2),
        Feature("tab"),
        Feature("age", kind="numeric"),
    ),
    tasks=(Task("buy", window_s=3), Task("watched", kind="regression", window_s=8), Task("click", window_s=5)),
)
CHANGE = SchemaChange(SCHEMA, NOW, Renames(features={"cost": "price"}, tasks={"watched": "watch"}))
SAME_WINDOWS = SchemaChange(
    SCHEMA, Schema("after", (*NOW.tasks, Task("like", window_s=10)), NOW.features), CHANGE.renamed
)
Events = tuple[list[Impression], list[Feedback]]
WAITS = st.fixed_dictionaries(
    {}, optional={"click": st.sampled_from(["immediate", "window", 2.0]), "default": st.sampled_from(["window", 2.0])}
)


def assemble(schema: Schema, join: JoinConfig) -> Assembler:
    return Assembler(schema, join, MiniBatchConfig(size=4, max_wait_s=None), join_sources(PARTITIONS))


def taken(assembler: Assembler) -> list[ExampleBlock]:
    batches = []
    while (batch := assembler.next_batch()) is not None:
        batches.append(batch)
    return batches


def assert_same(one: ExampleBlock, other: ExampleBlock) -> None:
    for name, column in one.arrays().items():
        np.testing.assert_array_equal(column, other.arrays()[name], err_msg=name)


@settings(max_examples=120, deadline=None)
@given(
    events=st.integers(0, 2**32).map(_events),
    at=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    wait=WAITS,
    correction=CORRECTIONS,
    kept=st.integers(0, 3),
)
def test_a_join_goes_on_as_if_it_had_had_the_new_schema_from_the_start(
    events: Events, at: tuple[float, float], wait: dict[str, Wait], correction: Correction, kept: int
) -> None:
    """Windows and waits of the tasks stay. So the same examples come out, in the same batches, whenever it changes."""
    change = SAME_WINDOWS
    join = JoinConfig(1.0, 1e6, 1, wait, correction)
    impressions, feedback = impression_block(events[0]), feedback_block(events[1])
    middle = [int(len(block) * share) for block, share in zip((impressions, feedback), at, strict=True)]
    before, always = assemble(SCHEMA, join), assemble(change.now, join)
    pushed = impressions.take(slice(0, middle[0])), feedback.take(slice(0, middle[1]))
    before.push(*pushed)
    always.push(change.impressions(pushed[0]), change.feedback(pushed[1]))
    for _ in range(min(kept, len(before._batches._ready))):
        assert_same(change.examples(before.next_batch()), always.next_batch())  # type: ignore[arg-type]

    carried = carry_over_stream(before.state(), change, join)
    after = assemble(change.now, join)
    after.load_state(carried.state)

    rest = change.impressions(impressions.take(slice(middle[0], None)))
    more = change.feedback(feedback.take(slice(middle[1], None)))
    for assembler in (after, always):
        assembler.push(rest, more)
        assembler.flush()
    assert not carried.restaged
    assert after.ledger() == always.ledger()
    for one, other in zip(taken(after), taken(always), strict=True):
        assert_same(one, other)


@settings(max_examples=40, deadline=None)
@given(events=st.integers(0, 2**32).map(_events), at=st.tuples(st.floats(0, 1), st.floats(0, 1)), wait=WAITS)
def test_nothing_is_lost_where_a_task_goes_and_one_comes(
    events: Events, at: tuple[float, float], wait: dict[str, Wait]
) -> None:
    join = JoinConfig(1.0, 1e6, 1, wait)
    impressions, feedback = impression_block(events[0]), feedback_block(events[1])
    middle = [int(len(block) * share) for block, share in zip((impressions, feedback), at, strict=True)]
    before = assemble(SCHEMA, join)
    before.push(impressions.take(slice(0, middle[0])), feedback.take(slice(0, middle[1])))
    ledger = before.ledger()

    carried = carry_over_stream(before.state(), CHANGE, join)
    after = assemble(NOW, join)
    after.load_state(carried.state)

    was, now = before.ledger(), after.ledger()
    assert ledger == was
    assert now.feedback_dropped == carried.dropped == was.feedback_waiting - now.feedback_waiting
    assert (now.impressions, now.feedback, now.waiting) == (was.impressions, was.feedback, was.waiting)

    # Its own service shows on, with labels of the new task, too.
    shown = CHANGE.impressions(impressions.take(slice(middle[0], None)))
    shown.no_label[:] = 0
    shown.impression_id[:] += 1000
    after.push(shown, CHANGE.feedback(feedback.take(slice(middle[1], None))))
    after.flush()
    new = NOW.task_index["buy"]
    for block in taken(after):
        of_before = block.impression_id < 1000
        assert not block.label_mask[of_before, new].any()
        is_last = (block.kind == CLOSING) | (block.kind == 0)
        assert block.label_mask[~of_before & is_last, new].all()
    end = after.ledger()
    outcomes = end.attached + end.corrected + end.feedback_late + end.orphaned + end.feedback_duplicate
    assert outcomes + end.feedback_dropped == end.feedback == len(feedback)
    assert end.handed_out + end.late + end.duplicate == end.impressions == len(impressions)


def test_a_dropped_tasks_feedback_still_tells_how_far_the_stream_is() -> None:
    """A partition in which nothing else comes would hold up all others, for it is not idle."""
    join = JoinConfig(1.0, 1e6, 1)
    after = assemble(NOW, join)
    rng = Random(1)
    shown = CHANGE.impressions(impression_block([(key, 1000 + key) for key in range(8)]))
    likes = feedback_block([(key, 60_000 + rng.randint(0, 9), 1, 1.0) for key in range(8)])
    assert (CHANGE.task_numbers(likes.task) == NEW).all()

    after.push(shown, CHANGE.feedback(likes))
    after.push(CHANGE.impressions(impression_block([(key, 60_000) for key in range(8, 16)])), likes.take(slice(0, 0)))

    assert sum(map(len, taken(after))) == 8
    assert after.ledger().feedback_dropped == 8
