"""Cuts: what the training thread copies of the weights for serving, and the payloads that are made of them.

Letters: N rows that changed.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from feature_store.feedback_times import FeedbackTimes
from feature_store.folding import merged_all
from feature_store.payload import Block, Precision, write_payload
from feature_store.payload_parts import PART, part_text
from feature_store.pieces import Payload
from smes.model.deltas import FullView, RowDelta
from smes.schema import Schema

_MOST_FEEDBACK = 16_384  # rows of feedback times of cuts that were not published; then neighbours are merged


@dataclass(frozen=True, slots=True)
class Cut:
    """The weights of one moment, and what their manifest says.

    With ``deltas`` it is published as a delta, and with a ``view`` as well its base follows. With a view alone it is
    published as a full snapshot.

    Attributes:
        step: Steps taken; becomes the version.
        dense: ``dense.*`` → copies that nothing else writes to.
        deltas: What changed in the table since the cut before, and before it since earlier cuts that were not
            published, oldest first. Empty: nothing is known to apply.
        view: The whole table; whoever gets the cut closes it.
        positions: Topic → partition → next record to read.
        event_time_ms: Event time of the last example trained on; None before the first one.
        metrics: Plain JSON values.
        cut_ms: Wall time of the cut, Unix milliseconds.
        feedback: The feedback events trained on since the last cut.
        held: Why it is only to be kept aside; None: it is to be served.
    """

    step: int
    dense: Mapping[str, torch.Tensor]
    deltas: tuple[RowDelta, ...]
    view: FullView | None
    positions: dict[str, dict[str, int]]
    event_time_ms: int | None
    metrics: dict[str, Any]
    cut_ms: int
    feedback: FeedbackTimes
    held: str | None = None

    @property
    def is_full(self) -> bool:
        """Whether it is published as a full snapshot."""
        return not self.deltas

    @property
    def waiting_bytes(self) -> int:
        """Bytes of its deltas."""
        return sum(delta.nbytes for delta in self.deltas)

    def after(self, older: "Cut") -> "Cut":
        """This cut, which contains the training of an older one that was not published, in the place of both."""
        feedback = FeedbackTimes.concat([older.feedback, self.feedback])
        if len(feedback) > _MOST_FEEDBACK:
            feedback = feedback.merged()
        return replace(self, deltas=older.deltas + self.deltas if self.deltas else (), feedback=feedback)

    def without_view(self) -> "Cut":
        """The same without its view, which is closed."""
        if self.view is not None:
            self.view.close()
        return replace(self, view=None)


class Payloads:
    """Makes the payloads of cuts.

    Args:
        schema: Goes into the payload.
        model: Model configuration as plain data; goes into the payload.
        lineage: The lineage that the weights belong to.
        precision: Of the rows' weights.
        renamed: Feature → its name before, of those that were renamed; goes into the payload.
        part, parts: Which rank this is, and how many ranks write a part each.
    """

    def __init__(
        self,
        schema: Schema,
        model: dict[str, Any],
        lineage: str,
        precision: Precision = "fp32",
        renamed: Mapping[str, str] = MappingProxyType({}),
        *,
        part: int = 0,
        parts: int = 1,
    ) -> None:
        self.precision = precision
        self._metadata = {
            "schema": json.dumps(schema.to_dict()),
            "schema_hash": schema.hash,
            "model": json.dumps(model),
            "lineage": lineage,
        } | ({"renamed": json.dumps(dict(renamed))} if renamed else {})
        if parts > 1:
            self._metadata[PART] = part_text(part, parts)

    def delta(self, cut: Cut) -> Payload:
        """What changed since the last published cut: the cut's deltas, merged."""
        delta = merged_all(cut.deltas)
        groups = {name: column.shape[1] for name, column in delta.columns.items()}
        return write_payload(
            self._metadata | {"version": str(cut.step)},
            cut.dense,
            groups,
            len(delta),
            lambda: iter([(delta.keys, dict(delta.columns))]),
            removed=delta.removed,
            precision=self.precision,
        )

    def full(self, cut: Cut, is_cancelled: Callable[[], bool] = lambda: False) -> Payload:
        """Everything, read from the cut's view as the payload is written.

        Args:
            cut: Has a view.
            is_cancelled: Asked for each block.

        Raises:
            Cancelled: By its pieces.
        """
        view = cut.view
        assert view is not None, "a cut of which a full payload is made has a view"

        def blocks() -> Iterator[Block]:
            for block in view.blocks():
                if is_cancelled():
                    raise Cancelled
                yield block

        return write_payload(
            self._metadata | {"version": str(cut.step)},
            cut.dense,
            view.columns,
            view.num_rows,
            blocks,
            precision=self.precision,
        )


class Cancelled(Exception):
    """A payload is not needed any more."""
