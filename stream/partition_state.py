"""State by topic and partition: the names under which the stream's parts save what belongs to one partition.

Every array that belongs to a partition is named ``{topic}/{partition}/{what}``, and a row of a table is saved with the
partition that it belongs to. So the state of one partition can be separated from that of the others, and a stream that
has more partitions can load it:

============================ ===========================================================================================
``*/p/position``             the next record to read
``*/p/incarnation``          which log that is, as UTF-8 (:meth:`stream.log.event_log.EventLog.incarnations`)
``*/p/began``, ``*/p/lost``  where reading that log began, and what was lost unread (:mod:`stream.sources`)
``*/p/vouched_ms``           the event time that enough of the last events have reached (:mod:`stream.join.watermarks`)
``*/p/recent_*``             those last events
``*/p/ledger``               counts of events (:data:`stream.join.ledgers.COLUMNS`)
``*/p/refused``              counts of what never came to the join (:class:`stream.sources.Refused`)
``impressions/p/features``   look-ups of features that were left out (:mod:`stream.left_out_features`)
``feedback/p/entry.*``       feedback that was read before its impression
``impressions/p/entry.*``    impression ids that wait or are remembered, with the labels attached so far
``impressions/p/waiting.*``  the features of the impressions that wait
``impressions/p/queued.*``   examples in batches that were not taken yet, and their order
============================ ===========================================================================================

These belong to the whole stream: ``watermark_ms``; ``waits``, how long each task waits; ``late_counts``, how many
positives came within their tasks' wait and how many after it; ``begins_ms``, where there is one, up to which event time
impressions count as late (:mod:`stream.priming`); ``ready_sizes``, the sizes of the batches that are ready;
``ended``, how many examples were in batches that have ended. Where the state was divided among other ranks, it has
``other_ranks``, too (:mod:`stream.rank_shares`).

One partition's state is enough to go on with that partition alone, in another process for example, if an impression and
its feedback have the same partition number. :func:`stream.topics.partition_of` gives them the same. When the number of
partitions has grown, feedback on impressions from before can be in another partition; wait until their attribution
windows have passed.
"""

from collections.abc import Iterable

import numpy as np

from smes.arrays import Arrays, prefixed, under

OTHER_RANKS = "other_ranks"
"""Name of an array, of any value, of a state whose batches were made anew: none of them ends where one ended before."""


def state_name(topic: str, partition: int, what: str) -> str:
    """The name of an array that belongs to one partition."""
    return f"{topic}/{partition}/{what}"


def saved_partitions(state: Arrays, topic: str) -> list[int]:
    """The partitions of a topic that a state holds something of, ascending."""
    names = (name.split("/") for name in state if name.startswith(f"{topic}/"))
    return sorted({int(partition) for _, partition, *_ in names})


def require_partitions(state: Arrays, topics: Iterable[str], expected: int) -> None:
    """Check that no partition of a state would be lost.

    Raises:
        ValueError: The state has more than ``expected`` partitions of a topic.
    """
    for topic in topics:
        found = len(saved_partitions(state, topic))
        if found > expected:
            raise ValueError(
                f"topic {topic!r}: state of {found} partitions, expected at most {expected}: "
                "partitions can be added to a topic, not taken away"
            )


def save_rows(topic: str, what: str, columns: Arrays, partitions: Iterable[int]) -> Arrays:
    """Split a table into one table per partition, in which rows keep their order.

    Args:
        topic: Which topic's partitions.
        what: Name of the table.
        columns: Equally long; the column ``partition`` says where each row belongs.
        partitions: All partitions of the topic; one without rows gets an empty table.
    """
    columns = dict(columns)
    partition = columns.pop("partition")
    order = np.argsort(partition, kind="stable")
    partition = partition[order]
    columns = {name: column[order] for name, column in columns.items()}
    state: Arrays = {}
    for p in partitions:
        start, stop = np.searchsorted(partition, [p, p + 1])
        rows = {name: column[start:stop] for name, column in columns.items()}
        state |= prefixed(state_name(topic, p, f"{what}."), rows)
    return state


def load_rows(topic: str, what: str, state: Arrays) -> Arrays:
    """The inverse of :func:`save_rows`: the rows of all partitions, one partition after the other."""
    partitions = saved_partitions(state, topic)
    tables = [under(state_name(topic, p, f"{what}."), state) for p in partitions]
    columns = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    lengths = [len(next(iter(table.values()))) for table in tables]
    columns["partition"] = np.repeat(np.array(partitions, np.int32), lengths)
    return columns
