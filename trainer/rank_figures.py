"""What all ranks of a training have counted, together: the sums that the report, the metrics and the manifests show."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

import msgspec

from smes.model.learner import Learner
from smes.model.memory_use import MemoryUse
from smes.model.rows_config import RowCounts
from smes.world import World
from stream.join.ledgers import StreamLedger
from trainer.stream import Stream

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class RankFigures:
    """Figures of one rank, or of all together.

    Attributes:
        ledger: Where every event is that was read.
        positions: Topic → partition → next record to read.
        rows: The rows of ids.
        num_rows: Rows of the id table in use.
        memory: Bytes of the learner's parts.
        join_nbytes: Bytes of the join.
    """

    ledger: StreamLedger
    positions: dict[str, dict[str, int]]
    rows: RowCounts
    num_rows: int
    memory: MemoryUse
    join_nbytes: int

    @classmethod
    def of(cls, stream: Stream, learner: Learner) -> "RankFigures":
        """Those of one rank, now."""
        return cls(
            ledger=stream.ledger(),
            positions=stream.positions_by_topic(),
            rows=learner.row_counts,
            num_rows=learner.num_rows,
            memory=learner.memory,
            join_nbytes=stream.join_nbytes,
        )

    def of_all(self, world: World) -> "RankFigures | None":
        """Those of all ranks together, on rank 0; None on the others. All ranks call it together."""
        messages = world.collect(msgspec.msgpack.encode(self))
        return together([msgspec.msgpack.decode(message, type=RankFigures) for message in messages])


def together(figures: Sequence[RankFigures]) -> RankFigures | None:
    """The sums of the figures of several ranks, and the positions of all; None of none."""
    if not figures:
        return None
    positions: dict[str, dict[str, int]] = {}
    for each in figures:
        for topic, partitions in each.positions.items():
            positions.setdefault(topic, {}).update(partitions)
    return RankFigures(
        ledger=added([each.ledger for each in figures]),
        positions={topic: dict(sorted(p.items(), key=lambda at: int(at[0]))) for topic, p in sorted(positions.items())},
        rows=added([each.rows for each in figures]),
        num_rows=sum(each.num_rows for each in figures),
        memory=added([each.memory for each in figures]),
        join_nbytes=sum(each.join_nbytes for each in figures),
    )


def added(counts: Sequence[_T]) -> _T:
    """The sum of dataclasses of counts, field by field."""
    first: Any = counts[0]
    total: Any
    if not is_dataclass(first):
        total = sum(counts)  # they are numbers
    else:
        kind: Any = type(first)
        total = kind(**{f.name: added([getattr(each, f.name) for each in counts]) for f in fields(first)})
    return total  # type: ignore[no-any-return]
