"""Events as columns: impressions and feedback as the wire codecs decode them, and the examples that the join makes.

Also here: how the columns of features are filled and checked.

Letters: N rows, W id columns (:attr:`Schema.id_width`), F numeric columns, T tasks, L columns of a bag.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from smes.arm_names import ArmColumn, no_arms
from smes.arrays import F32, I8, I32, I64, U64, Bool
from smes.schema import MISSING, Schema

Index = I64 | Bool | slice
DAY_S = 86_400.0

WHOLE, FIRST, FURTHER, CLOSING = range(4)
"""Kind of an example: the only one of its impression; its first one of several; a further one to train on, for tasks
that wait longer or with feedback that came after its wait; the last one, with the final labels, not to be trained on.
"""


DROPPED = -1
"""Task of feedback for a task that there is no more (:mod:`smes.schema_change`). It tells how far the stream is."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Columns of equal length."""

    def __len__(self) -> int:
        return len(getattr(self, next(iter(self.__dataclass_fields__))))

    def take(self, rows: Index) -> Self:
        """Choose rows, in the given order."""
        return type(self)(**{name: column[rows] for name, column in self.arrays().items()})

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Column name → array. ``type(block)(**block.arrays())`` builds an equal block."""
        # Not by ``fields()``: CPython keeps up to 2,000 of the tuples that it makes, when they are longer than ten.
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def concat(cls, blocks: Sequence[Self]) -> Self:
        """Join the rows of one or more blocks, in the given order."""
        if len(blocks) == 1:
            return blocks[0]
        return cls(**{name: np.concatenate([getattr(b, name) for b in blocks]) for name in cls.__dataclass_fields__})


@dataclass(frozen=True, slots=True)
class ImpressionBlock(_Rows):
    """Impressions, one per row. An impression is an item that was shown to a user.

    Attributes:
        impression_id: int64 [N], unique.
        request_id: int64 [N], ``MISSING`` where the log has none.
        event_time_ms: int64 [N], Unix milliseconds.
        ids: int64 [N, W], ``MISSING`` where a value is missing. Column 0 is the user id, column 1 the item id.
        numerics: float32 [N, F], NaN where a value is missing.
        served_version: int64 [N], the version that scored the impression, ``MISSING`` if it was not served.
        served_scores: float32 [N, T], the scores that it was served with, NaN where missing.
        served_arm: uint8 [N, 16], the scorer's arm that scored it; see :mod:`smes.arm_names`.
        no_label: uint64 [N], bit t: there will be no label of task t, for who made the event does not know the task. It
            is of a schema before (:mod:`smes.schema_change`).
        partition: int32 [N], the event-log partition that the row was read from.
        offset: int64 [N], the record's offset in that partition. Rows of one Arrow record have the same offset.
        arrival_ms: int64 [N], when the record reached the event log, Unix milliseconds; 0 for rows of a log in files.
    """

    impression_id: I64
    request_id: I64
    event_time_ms: I64
    ids: I64
    numerics: F32
    served_version: I64
    served_scores: F32
    served_arm: ArmColumn
    no_label: U64
    partition: I32
    offset: I64
    arrival_ms: I64

    @property
    def user_id(self) -> I64:
        """int64 [N], a view of ``ids``."""
        column: I64 = self.ids[:, 0]
        return column

    @property
    def item_id(self) -> I64:
        """int64 [N], a view of ``ids``."""
        column: I64 = self.ids[:, 1]
        return column

    @classmethod
    def empty(cls, schema: Schema, n: int = 0) -> "ImpressionBlock":
        """Make ``n`` rows: optional values are missing, required ones 0."""
        return cls(
            impression_id=np.zeros(n, np.int64),
            request_id=np.full(n, MISSING, np.int64),
            event_time_ms=np.zeros(n, np.int64),
            ids=np.full((n, schema.id_width), MISSING, np.int64),
            numerics=np.full((n, schema.num_numerics), np.nan, np.float32),
            served_version=np.full(n, MISSING, np.int64),
            served_scores=np.full((n, schema.num_tasks), np.nan, np.float32),
            served_arm=no_arms(n),
            no_label=np.zeros(n, np.uint64),
            partition=np.zeros(n, np.int32),
            offset=np.zeros(n, np.int64),
            arrival_ms=np.zeros(n, np.int64),
        )


@dataclass(frozen=True, slots=True)
class FeedbackBlock(_Rows):
    """Feedback, one event per row. A feedback event is one outcome of one impression.

    Attributes:
        impression_id: int64 [N].
        event_time_ms: int64 [N], Unix milliseconds.
        task: int32 [N], index into :attr:`Schema.tasks`; :data:`DROPPED` for a task of an earlier schema that there is
            no more.
        value: float32 [N], 0 or 1 for a binary task, 0 … ``max_value`` for a regression task.
        partition, offset, arrival_ms: As in :class:`ImpressionBlock`.
    """

    impression_id: I64
    event_time_ms: I64
    task: I32
    value: F32
    partition: I32
    offset: I64
    arrival_ms: I64

    @classmethod
    def empty(cls, n: int = 0) -> "FeedbackBlock":
        """Make ``n`` rows of zeros."""
        return cls(
            impression_id=np.zeros(n, np.int64),
            event_time_ms=np.zeros(n, np.int64),
            task=np.zeros(n, np.int32),
            value=np.zeros(n, np.float32),
            partition=np.zeros(n, np.int32),
            offset=np.zeros(n, np.int64),
            arrival_ms=np.zeros(n, np.int64),
        )


@dataclass(frozen=True, slots=True)
class ExampleBlock(_Rows):
    """Examples, one per row. An example is an impression with the labels that the join attached.

    Attributes:
        impression_id, request_id, event_time_ms, ids, numerics, served_version, served_scores, served_arm, partition:
            As in :class:`ImpressionBlock`.
        labels: float32 [N, T], 0 where ``label_mask`` is false.
        label_mask: bool [N, T], false where the row has no label of the task. Such a cell adds nothing to any loss or
            metric.
        weight: float32 [N], sample weight.
        feedback_arrival_ms: int64 [N, T], when the attached feedback reached the event log, ``MISSING`` where there is
            none.
        due_ms: int64 [N], event time that the join's watermark has to pass before the row is emitted. Rows come in this
            order.
        kind: int8 [N], one of ``WHOLE, FIRST, FURTHER, CLOSING``. Each impression has either one ``WHOLE`` row, or one
            ``FIRST``, any number of ``FURTHER`` and one ``CLOSING`` row, in this order.
        late_share: float32 [N, T], which share of the task's positives is not known yet when an impression is first
            trained on for it, 0 … 1. It weighs the loss (:mod:`smes.model.delayed_feedback`); 0 leaves it as it is.
    """

    impression_id: I64
    request_id: I64
    event_time_ms: I64
    ids: I64
    numerics: F32
    served_version: I64
    served_scores: F32
    served_arm: ArmColumn
    partition: I32
    labels: F32
    label_mask: Bool
    weight: F32
    feedback_arrival_ms: I64
    due_ms: I64
    kind: I8
    late_share: F32

    @property
    def user_id(self) -> I64:
        """int64 [N], a view of ``ids``."""
        column: I64 = self.ids[:, 0]
        return column

    @property
    def begins(self) -> Bool:
        """bool [N], which rows are the first of their impression: as many as impressions."""
        first: Bool = self.kind <= FIRST
        return first

    @property
    def num_impressions(self) -> int:
        """How many impressions begin here; each of them once, however many examples it has."""
        return int(np.count_nonzero(self.begins))

    def to_train_on(self) -> "ExampleBlock":
        """The rows to train on, all but those of kind ``CLOSING``; the block itself if these are all."""
        trains = self.kind != CLOSING
        return self if trains.all() else self.take(trains)

    def closings(self) -> "ExampleBlock":
        """The rows of kind ``CLOSING``."""
        return self.take(self.kind == CLOSING)

    @classmethod
    def empty(cls, schema: Schema, n: int = 0) -> "ExampleBlock":
        """Make ``n`` whole examples: features are missing, every label is 0 and counts, every weight is 1."""
        impressions = ImpressionBlock.empty(schema, n)
        shape = (n, schema.num_tasks)
        return cls(
            impression_id=impressions.impression_id,
            request_id=impressions.request_id,
            event_time_ms=impressions.event_time_ms,
            ids=impressions.ids,
            numerics=impressions.numerics,
            served_version=impressions.served_version,
            served_scores=impressions.served_scores,
            served_arm=impressions.served_arm,
            partition=impressions.partition,
            labels=np.zeros(shape, np.float32),
            label_mask=np.ones(shape, np.bool_),
            weight=np.ones(n, np.float32),
            feedback_arrival_ms=np.full(shape, MISSING, np.int64),
            due_ms=np.zeros(n, np.int64),
            kind=np.full(n, WHOLE, np.int8),
            late_share=np.zeros(shape, np.float32),
        )


def misaligned(ids_NW: I64, schema: Schema) -> Bool:
    """Find rows in which a sequence and the one that it accompanies differ in length. int64 [N, W] → bool [N]."""
    bad: Bool = np.zeros(len(ids_NW), np.bool_)
    for name, companions in schema.companions.items():
        present_NL = ids_NW[:, schema.id_slices[name]] != MISSING
        for companion in companions:
            bad |= ((ids_NW[:, schema.id_slices[companion.name]] != MISSING) != present_NL).any(axis=1)
    return bad


def fill_elapsed(numerics_NF: F32, schema: Schema, now_ms: I64 | int) -> None:
    """Replace stored times with the days from then to now, in place, in the columns of ``elapsed`` features.

    Args:
        numerics_NF: float32 [N, F]; the stored times are seconds since 1970.
        schema: The features.
        now_ms: Unix milliseconds, one number or int64 [N].
    """
    for column, feature in enumerate(schema.numeric_features):
        if feature.elapsed:
            stored_s = numerics_NF[:, column].astype(np.float64)
            numerics_NF[:, column] = (np.asarray(now_ms) / 1000 - stored_s) / DAY_S


def scatter_bags(out_NL: I64, values: I64, starts: I64, lengths: I64) -> None:
    """Write ragged bags into the fixed columns of an ``ids`` matrix.

    A bag fills its row from the left. Elements beyond L are dropped. The columns after a short bag are not written.

    Args:
        out_NL: int64 [N, L], a view of the bag's columns, filled with ``MISSING``.
        values: int64, the elements of all bags.
        starts: int64 [N], where the elements of each row begin in ``values``.
        lengths: int64 [N], how many elements each row has.
    """
    kept = np.minimum(lengths, out_NL.shape[1])
    rows = np.repeat(np.arange(len(kept)), kept)
    ends = np.cumsum(kept)
    columns = np.arange(len(rows)) - np.repeat(ends - kept, kept)
    out_NL[rows, columns] = values[np.repeat(starts, kept) + columns]
