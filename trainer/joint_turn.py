"""One turn of the loop over ranks: what each rank says, and what all of them decide by that alone.

In every turn each rank tells the others whether it has a batch, and what is asked of it. All decide the same from the
same numbers, so no further message is needed. A step takes place when every rank has a batch or cannot get one; those
that cannot take part with an empty batch. Letters: N ranks.
"""

from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields

import numpy as np
import torch

from smes.arrays import I64, Bool
from smes.schema import MISSING
from smes.world import World


@dataclass(frozen=True, slots=True)
class Said:
    """What a rank says in a turn. Whole numbers; truth values are 0 or 1.

    Attributes:
        phase: Where its loop is: it trains live, drains, flushes.
        has_batch: Whether a batch is ready.
        to_train_on: Examples in it to train on.
        closings: Examples in it with final labels.
        impressions: Impressions in it, each of which counts once, with its first example.
        newest_ms: Event time of its newest example to train on, Unix milliseconds; ``MISSING`` without one.
        cannot: Without a batch, it will not get one: its partitions are idle, or read to the end that was agreed on.
        is_spent: It has had nothing new for so long that what a restart was to repeat will not come.
        is_over: Nothing more can come to it before the loop's phase ends.
        stop: A stop was asked of it.
        failed: It met an error, and ends.
        snapshot, checkpoint, figures: What rank 0's schedules ask for.
        checkpoint_part: Its :meth:`trainer.shared_checkpoints.SharedCheckpointWriter.report`.
        mail: It has something to tell rank 0.
    """

    phase: int = 0
    has_batch: int = 0
    to_train_on: int = 0
    closings: int = 0
    impressions: int = 0
    newest_ms: int = MISSING
    cannot: int = 0
    is_spent: int = 0
    is_over: int = 0
    stop: int = 0
    failed: int = 0
    snapshot: int = 0
    checkpoint: int = 0
    checkpoint_part: int = 0
    figures: int = 0
    mail: int = 0


_PLACES = {field.name: place for place, field in enumerate(fields(Said))}


class Turn:
    """What all ranks have said in a turn.

    Args:
        said: int64 [N, fields of :class:`Said`].
    """

    def __init__(self, said: I64) -> None:
        self._said = said

    @classmethod
    def take(cls, world: World, own: Said) -> "Turn":
        """Say something, and hear the others.

        Raises:
            RankLost: One of them has gone.
        """
        row = torch.tensor([astuple(own)], dtype=torch.int64)
        ones = [1] * world.size
        return cls(world.trade(row.repeat(world.size, 1), ones, ones).numpy())

    def of(self, name: str) -> I64:
        """One field of all ranks. int64 [N]."""
        column: I64 = self._said[:, _PLACES[name]]
        return column

    def any(self, name: str) -> bool:
        """Whether a rank says so."""
        return bool(self.of(name).any())

    def all(self, name: str) -> bool:
        """Whether all ranks say so."""
        return bool(self.of(name).all())

    def first(self, name: str) -> int:
        """The first rank that says so; there is one."""
        return int(np.flatnonzero(self.of(name))[0])


@dataclass(frozen=True, slots=True)
class JointStep:
    """A step that takes place.

    Attributes:
        takes_part: bool [N], which ranks take the batch that they have; the others have an empty one.
        to_train_on, closings, impressions: Sums over the ranks that take part, as of :class:`Said`.
        newest_ms: Of the newest example to train on; ``MISSING`` without one.
    """

    takes_part: Bool
    to_train_on: int
    closings: int
    impressions: int
    newest_ms: int


class Repeats:
    """Which ranks took part in steps that a restart repeats, by the number of the step.

    Args:
        masks: Number of a step, counted from 1 → bit k: rank k took part.
    """

    def __init__(self, masks: Mapping[int, int]) -> None:
        self._masks = dict(masks)

    def of(self, number: int, size: int) -> Bool | None:
        """bool [N]: which ranks take part in a step; None if it is not repeated."""
        mask = self._masks.get(number)
        return None if mask is None else np.array([mask >> rank & 1 for rank in range(size)], np.bool_)

    def clear(self) -> None:
        """Repeat nothing from now on."""
        self._masks.clear()


def next_step(turn: Turn, wanted: Bool | None) -> JointStep | None:
    """The step that takes place now, if any.

    Args:
        turn: What the ranks have said.
        wanted: Which ranks take part in it, where it is repeated.
    """
    has, cannot = turn.of("has_batch").astype(np.bool_), turn.of("cannot").astype(np.bool_)
    takes_part = has if wanted is None else wanted
    if not takes_part.any() or not (has[takes_part].all() if wanted is not None else (has | cannot).all()):
        return None
    return JointStep(
        takes_part=takes_part,
        to_train_on=int(turn.of("to_train_on")[takes_part].sum()),
        closings=int(turn.of("closings")[takes_part].sum()),
        impressions=int(turn.of("impressions")[takes_part].sum()),
        newest_ms=int(turn.of("newest_ms")[takes_part].max()),
    )


def mask_of(takes_part: Bool) -> int:
    """The ranks as bits, for :class:`Repeats`."""
    return sum(1 << rank for rank in np.flatnonzero(takes_part).tolist())
