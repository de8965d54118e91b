"""What some ranks have written, divided among other ones: by key, by partition, and rank 0's to all."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from smes.arrays import I64, Arrays, prefixed, under
from smes.errors import CheckpointError
from smes.model.ids import IdKeys
from smes.model.row_shares import share_of_rows
from smes.schema import Schema
from stream.rank_shares import share_of_stream
from trainer.checkpoint_file import Checkpoint
from trainer.checkpoint_parts import SHARDED
from trainer.evaluation import with_all_scored

_logger = logging.getLogger(__name__)


def share_of(parts: Sequence[Checkpoint], rank: int, size: int) -> Checkpoint:
    """What one of ``size`` ranks goes on from.

    Rows of the id table and partitions of the stream are divided anew (:func:`smes.model.row_shares.share_of_rows`,
    :func:`stream.rank_shares.share_of_stream`); everything else is that of rank 0, for all. What compares with rows as
    they were at an earlier moment is given up: the evaluation window that is open ends, and what the publish gate takes
    for usual begins anew.

    Args:
        parts: What each rank has written, in their order; of one rank its whole checkpoint. May be read in part
            (``only`` of :func:`trainer.checkpoint_file.read_checkpoint`).
        rank, size: Of the rank that goes on. One of one rank goes on from everything.

    Raises:
        CheckpointError: The parts do not fit together.
    """
    first = parts[0]
    try:
        arrays = {name: array for name, array in first.arrays.items() if not name.startswith(SHARDED)}
        arrays = _without_earlier_rows(arrays)
        if "learner.table.keys" in first.arrays:
            rows = [_rows_of(part.arrays) for part in parts]
            arrays |= prefixed("learner.", share_of_rows(rows, rank, size, _required(first)))
        if streams := [stream for part in parts if (stream := under("stream.", part.arrays))]:
            arrays |= prefixed("stream.", share_of_stream(streams, rank, size))
    except (KeyError, ValueError) as error:
        ranks = "1 rank" if len(parts) == 1 else f"{len(parts)} ranks"
        raise CheckpointError(
            f"checkpoint of step {first.step}, of {ranks}: cannot be divided among {size}: {error}"
        ) from error
    return replace(first, arrays=arrays, on_disk=False)


def _rows_of(arrays: Arrays) -> Arrays:
    learner = under("learner.", arrays)
    return {name: array for name, array in learner.items() if name.startswith(("table.", "rows."))}


def _required(checkpoint: Checkpoint) -> I64:
    """The keys of the rows that every table has."""
    shared_rows: I64 = checkpoint.arrays["learner.dense.shared_rows_V"]
    return IdKeys(Schema.from_dict(checkpoint.schema), shared_rows).required


def _without_earlier_rows(arrays: Arrays) -> Arrays:
    """All arrays but those that belong to rows, as they were numbered, at an earlier moment."""
    kept = {name: a for name, a in arrays.items() if not name.startswith(("evaluation.", "gate."))}
    if evaluation := under("evaluation.", arrays):
        evaluation = {n: a for n, a in with_all_scored(evaluation).items() if not n.startswith("frozen.")}
        kept |= prefixed("evaluation.", evaluation)
    if any(name.startswith("gate.") for name in arrays):
        _logger.warning("other ranks go on from the checkpoint: what the publish gate takes for usual begins anew")
    return kept
