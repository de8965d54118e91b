"""The stream's state across a change of the schema: what waits and is remembered goes on under the new one.

Positions, watermarks, ledgers and ids stay as they are. Impressions that wait keep the labels that were attached to
them; they have none of new tasks, for who showed them did not know these (:attr:`ImpressionBlock.no_label
<smes.events.ImpressionBlock.no_label>`). Feedback that waits for its impression and is of a task that there is no more
is counted as dropped. So both ledgers balance before and after.

Letters: M entries, T tasks, P partitions.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smes.arrays import I64, Arrays
from smes.schema import MISSING
from smes.schema_change import NEW, SchemaChange
from stream.config import JoinConfig
from stream.join.entries import EARLY
from stream.join.ledgers import HELD, READ
from stream.join.waits import described, stages_of
from stream.log.event_log import TopicPartition
from stream.partition_state import saved_partitions, state_name
from stream.sources import refused_in
from stream.topics import FEEDBACK, IMPRESSIONS


class CarriedStream(NamedTuple):
    """A stream's state under the new schema.

    Attributes:
        state: As :meth:`stream.example_stream.ExampleStream.load_state` takes it.
        dropped: Feedback that waited for its impression and is of tasks that there are no more.
        restaged: Whether tasks wait otherwise than before, so that impressions that were trained on for some tasks are
            so with later feedback alone (:meth:`stream.join.joiner.Joiner.load_state`).
    """

    state: Arrays
    dropped: int
    restaged: bool


def carry_over_stream(state: Arrays, change: SchemaChange, join: JoinConfig) -> CarriedStream:
    """Convert the state of a stream.

    Args:
        state: Of a stream of the schema before. It is not changed.
        change: Without :attr:`~smes.schema_change.SchemaChange.problems_of_events`.
        join: How the new stream joins.
    """
    converted = {name: _converted(name, array, change) for name, array in state.items()}
    dropped = _drop_early(state, converted, change)
    converted["late_counts"] = change.by_task(state["late_counts"], 0, axis=0)
    waits, restaged = _waits(state["waits"], change, join)
    converted["waits"] = waits
    return CarriedStream(converted, dropped, restaged)


def waiting_in(state: Arrays) -> int:
    """How many impressions wait in a state for their first example."""
    found = saved_partitions(state, IMPRESSIONS)
    return sum(int(state[state_name(IMPRESSIONS, p, "ledger")][HELD]) for p in found)


def _converted(name: str, array: NDArray[Any], change: SchemaChange) -> NDArray[Any]:
    table, _, column = name.rpartition("/")[2].partition(".")
    convert = _COLUMNS.get(column) if table in ("entry", "waiting", "queued") else None
    return array if convert is None else convert(change, array)


def _by_task(fill: object) -> Callable[[SchemaChange, Any], NDArray[Any]]:
    return lambda change, array: change.by_task(array, fill, axis=1)


_COLUMNS: dict[str, Callable[[SchemaChange, Any], NDArray[Any]]] = {
    "ids": lambda change, array: change.ids(array),
    "numerics": lambda change, array: change.numeric_values(array),
    "served_scores": _by_task(np.nan),
    "no_label": lambda change, array: change.task_bits(array, new=True),
    "pending": lambda change, array: change.task_bits(array),
    "seen": lambda change, array: change.task_bits(array),
    "attached": lambda change, array: change.task_bits(array),
    "labels": _by_task(0),
    "label_mask": _by_task(False),
    "label_time_ms": _by_task(0),
    "label_due_ms": _by_task(0),
    "label_arrival_ms": _by_task(0),
    "label_partition": _by_task(0),
    "not_before_ms": _by_task(0),
    "feedback_arrival_ms": _by_task(MISSING),
    "late_share": _by_task(0),
}
"""Columns of tables that depend on the schema."""


def _drop_early(state: Arrays, converted: Arrays, change: SchemaChange) -> int:
    """Count feedback of dropped tasks that waits as dropped: it has never reached an impression."""
    dropped = _early_of_dropped_tasks(state, change)
    for partition, count in dropped.items():
        name = state_name(FEEDBACK, partition, "ledger")
        converted[name] = state[name].copy()
        converted[name][[READ, HELD]] -= count
        refused = refused_in(state, TopicPartition(FEEDBACK, partition))
        refused = refused._replace(dropped=refused.dropped + count)
        converted[state_name(FEEDBACK, partition, "refused")] = np.array(refused, np.int64)
    return dropped.total()


def _early_of_dropped_tasks(state: Arrays, change: SchemaChange) -> Counter[int]:
    """How much of it there is, by the partition that it was read from."""
    gone = np.flatnonzero(change.task_numbers(np.arange(change.was.num_tasks)) == NEW)
    found: Counter[int] = Counter()
    for p in saved_partitions(state, FEEDBACK):
        status, attached, of = (
            state[state_name(FEEDBACK, p, f"entry.{what}")] for what in ("status", "attached", "label_partition")
        )
        for task in gone.tolist():
            held = (status == EARLY) & (attached >> np.uint64(task) & np.uint64(1) == 1)
            found.update(of[held, task].tolist())
    return found


def _waits(was: I64, change: SchemaChange, join: JoinConfig) -> tuple[I64, bool]:
    """The tasks' waits as the new joiner has them, or other ones if impressions have to go on by other stages."""
    stages = stages_of(change.now, join.wait, join.correction, round(join.allowed_lateness_s * 1000))
    now = described(stages)
    goes_on = change.tasks != NEW
    same = (
        np.array_equal(now[goes_on], was[change.tasks[goes_on]])
        and set(now[:, 0].tolist()) == set(was[:, 0].tolist())
        and change.now.max_window_ms == change.was.max_window_ms
    )
    return (now, False) if same else (np.zeros((0, 2), np.int64), True)
