"""From what a log in files has primed to where a live stream begins.

A backtest (:class:`stream.block_stream.BlockStream`) reads everything from one partition and has no positions. The live
stream has partitions, each with a position. What the two share is the join: impressions that wait, ids that are
remembered, and how far event time is. This turns the state of the one into a state of the other.

What the live log holds of the same events is dropped by the join as it stands, once the live stream goes on from the
primed watermark:

- *The log's ids are those of the live events.* A copy of an impression that waits or is remembered is a duplicate. An
  older copy is late. Feedback on an impression that waits is attached as ever.
- *The log has no ids* (the reader numbers its rows). No live event can be told from them, so time decides: impressions
  up to the newest of the log are late, and their feedback is orphaned. The rows that waited were trained on with the
  labels that the log has.

All of it is counted where such events are always counted, and the audit's equations hold: what was read from files lies
before the position where the reading of the live log began.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from smes.arrays import I64, Arrays
from stream.join.entries import DONE, EARLY
from stream.join.ledgers import COLUMNS, HELD, READ
from stream.join.watermarks import START_OF_TIME
from stream.log.event_log import Positions, TopicPartition
from stream.partition_state import load_rows, save_rows, state_name
from stream.sources import Began, Lost, counted_in
from stream.topics import FEEDBACK, IMPRESSIONS, partition_of

BLOCKS = "blocks"
"""The topic under which a stream of blocks says how far it is."""

NEWEST, OWN_IDS, POSITION = (state_name(BLOCKS, 0, what) for what in ("newest_ms", "own_ids", "position"))
"""Event time of the newest impression that was read, ``START_OF_TIME`` before any; whether impressions have ids of
their own (1) or numbers of rows (0); how many pairs of blocks were read.
"""


class Primed(NamedTuple):
    """What the state of a stream of blocks says of its log.

    Attributes:
        newest_ms: Event time of the newest impression.
        own_ids: Whether the ids are those of live events.
    """

    newest_ms: int
    own_ids: bool


def is_of_blocks(state: Arrays) -> bool:
    """Whether a stream's state is of a log in files."""
    return POSITION in state


def primed_by(state: Arrays) -> Primed:
    """What a state says of the log in files.

    Raises:
        KeyError: It is not of one.
    """
    return Primed(int(state[NEWEST][0]), bool(state[OWN_IDS][0]))


def live_state(state: Arrays, positions: Positions, incarnations: Mapping[TopicPartition, str]) -> Arrays:
    """The state of a :class:`stream.example_stream.ExampleStream` that goes on from a stream of blocks.

    Args:
        state: Of the stream of blocks.
        positions: Where the live stream begins, for every partition of both topics.
        incarnations: Which log that is.

    Raises:
        KeyError: ``state`` is of no stream of blocks.
    """
    log = primed_by(state)
    partitions = sum(source.topic == IMPRESSIONS for source in positions)
    live: Arrays = {name: state[name].copy() for name in ("watermark_ms", "waits", "late_counts", "ready_sizes")}
    live["ended"] = state["ended"].copy()
    if not log.own_ids:
        live["begins_ms"] = np.array([log.newest_ms], np.int64)
    live |= _rows(state, partitions, keep=log.own_ids)
    for source, position in sorted(positions.items()):

        def name(what: str, source: TopicPartition = source) -> str:
            return state_name(source.topic, source.partition, what)

        recent = state[state_name(source.topic, 0, "recent_ms")]
        live[name("vouched_ms")] = np.array([START_OF_TIME], np.int64)  # nothing has been read of it
        live[name("recent_ms")] = np.full_like(recent, START_OF_TIME)
        live[name("recent_id")] = np.zeros_like(recent)
        live[name("position")] = np.array([position], np.int64)
        live[name("incarnation")] = np.frombuffer(incarnations.get(source, "").encode(), np.uint8)
        live[name("lost")] = np.array(Lost(0, 0), np.int64)
        live[name("refused")] = np.zeros_like(state[state_name(source.topic, 0, "refused")])
    for topic in (IMPRESSIONS, FEEDBACK):
        at = [source for source in positions if source.topic == topic]
        live |= _ledgers(topic, at, state[state_name(topic, 0, "ledger")], _held(topic, live, at), log)
    for source, position in positions.items():
        began = Began(position, *counted_in(live, source))
        live[state_name(source.topic, source.partition, "began")] = np.array(began, np.int64)
    return live


def _rows(state: Arrays, partitions: int, *, keep: bool) -> Arrays:
    """The tables of the join and of the queue, with each row where its impression's id belongs."""
    live: Arrays = {}
    of_topics = {(IMPRESSIONS, "entry"): keep, (IMPRESSIONS, "waiting"): keep, (FEEDBACK, "entry"): keep}
    for (topic, what), kept in {**of_topics, (IMPRESSIONS, "queued"): True}.items():
        columns = load_rows(topic, what, state)
        if not kept:
            columns = {name: column[:0] for name, column in columns.items()}
        ids: I64 = columns["impression_id"]
        columns["partition"] = partition_of(ids, partitions)
        if "label_partition" in columns:
            shape = columns["label_partition"].shape
            columns["label_partition"] = np.broadcast_to(columns["partition"][:, None], shape).copy()
        live |= save_rows(topic, what, columns, range(partitions))
    return live


def _held(topic: str, live: Arrays, sources: list[TopicPartition]) -> dict[TopicPartition, int]:
    """How many events of each partition wait in the join's table: see the audit's equation ``waiting``."""
    held = {}
    for source in sources:
        what = state_name(topic, source.partition, "entry.")
        if f"{what}status" not in live:  # the other topic has fewer partitions
            held[source] = 0
        elif topic == IMPRESSIONS:
            waits = ~np.isin(live[f"{what}status"], (EARLY, DONE)) & (live[f"{what}stage"] == 0)
            held[source] = int(np.count_nonzero(waits))
        else:
            attached = live[f"{what}attached"][live[f"{what}status"] == EARLY]
            held[source] = int(np.bitwise_count(attached).sum())
    return held


def _ledgers(
    topic: str, sources: list[TopicPartition], whole: I64, held: dict[TopicPartition, int], log: Primed
) -> Arrays:
    """A ledger for each partition: what waits where it waits, everything else in the first."""
    found: Arrays = {}
    assert not log.own_ids or sum(held.values()) == whole[HELD], f"{topic}: {held} wait, the ledger has {whole[HELD]}"
    for source in sorted(sources):
        row = np.zeros(len(COLUMNS), np.int64)
        if source.partition == 0:
            row[:] = whole
            row[READ] -= whole[HELD]
        row[READ] += held[source]
        row[HELD] = held[source]
        found[state_name(topic, source.partition, "ledger")] = row
    return found
