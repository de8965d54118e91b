"""Checkpoints that the ranks of a training write together into one folder, and read together.

The folder is one that all ranks see: on one machine, or on a network file system that several machines mount. Every
rank calls the same methods at the same steps. All that ranks tell each other is told on the training's own thread, so
that its collectives stay in one order; beside the training each rank only writes files.

A checkpoint comes about in three turns of the loop or more::

    start    every rank, at one step: which checkpoint it is, from rank 0; each begins to write its part
    hear     all parts are on disk: rank 0 begins to write the manifest
    hear     the manifest is on disk: there is the checkpoint, and every rank knows

A rank that is killed before the last turn leaves parts that are no checkpoint (:mod:`trainer.checkpoint_parts`).
"""

import json
import logging
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from smes.errors import CheckpointError, SmesError
from smes.schema import Schema
from smes.world import World
from smes_io.clock import wait_until, wall_clock_ms
from trainer.checkpoint_file import DAMAGED, Checkpoint, CheckpointView, write_checkpoint
from trainer.checkpoint_parts import part_metadata, part_name, write_manifest
from trainer.checkpoint_shares import share_of
from trainer.checkpoints import LOCK, MANIFEST, CheckpointDirectory, stem

_logger = logging.getLogger(__name__)

_VISIBLE_S = 30.0  # a network file system may show what another machine has written later
_WRITING, _WRITTEN, _COMMITTED, _FAILED = range(4)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt to write a checkpoint.

    Attributes:
        step, sequence: Of the checkpoint.
        parts: Names of all ranks' files, in their order.
    """

    step: int
    sequence: int
    parts: Sequence[str]


class SharedCheckpoints:
    """The checkpoints in a folder that all ranks see. All methods are for the training's thread, on every rank alike.

    Attributes:
        directory: The folder.

    Args:
        directory: The folder, as each rank sees it.
        world: The ranks.
    """

    def __init__(self, directory: CheckpointDirectory, world: World) -> None:
        self.directory, self._world = directory, world

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other training out of the folder: rank 0 holds its lock. All ranks enter together.

        Raises:
            CheckpointError: Another trainer holds it, or this rank does not see the folder that rank 0 sees. If rank 0
                raises, all do.
        """
        raise NotImplementedError

    def newest(
        self,
        *,
        schema: Schema,
        model: dict[str, Any],
        carried_over: Callable[[Checkpoint], Checkpoint] | None = None,
    ) -> Checkpoint | None:
        """What this rank goes on from: its share of the newest checkpoint of which no rank's part is damaged.

        Any number of ranks may have written it. If it is not as it is on disk
        (:attr:`trainer.checkpoint_file.Checkpoint.on_disk`), write a checkpoint before the first step.

        Args:
            schema, model: As :func:`trainer.checkpoint_file.read_checkpoint`.
            carried_over: Makes a checkpoint of the present schema of one of another schema, of all ranks together.
                None: a checkpoint of another schema is refused.

        Returns:
            The share; None if the folder has no checkpoint.

        Raises:
            SchemaMismatch, CheckpointError: As :meth:`trainer.checkpoints.CheckpointDirectory.newest`. If one rank
                raises, all do.
        """
        raise NotImplementedError

    def begin(self, step: int) -> Attempt:
        """Agree with the other ranks on the next checkpoint.

        Raises:
            CheckpointError: Rank 0 cannot read the folder, or this rank is at another step than rank 0.
        """
        raise NotImplementedError


class SharedCheckpointWriter:
    """Writes one checkpoint at a time, this rank's part in a thread of its own.

    For the training's thread, on every rank alike: each of :meth:`start`, :meth:`wait` and :meth:`write` is a
    collective, and so must be what brings every rank's :meth:`report` to every rank's :meth:`hear`, once a turn.

    Attributes:
        saved_ms: When the newest checkpoint was known to be on disk, Unix milliseconds; None before the first one of
            this process.
        failures: Checkpoints that could not be written, the same on all ranks.

    Args:
        checkpoints: Where checkpoints go.
        world: The ranks.
    """

    def __init__(self, checkpoints: SharedCheckpoints, world: World) -> None:
        self.saved_ms: int | None = None
        self.failures = 0

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written; the same on all ranks."""
        raise NotImplementedError

    def start(self, checkpoint: CheckpointView, on_saved: Callable[[], object]) -> None:
        """Begin to write a checkpoint of this step, when the one before is done. If it cannot be written, that is logged.

        Args:
            checkpoint: This rank's part; closed when it was written or could not be.
            on_saved: Called by :meth:`hear` when the whole checkpoint is on disk.
        """
        raise NotImplementedError

    def report(self) -> int:
        """What the other ranks have to know in this turn: to be gathered from all ranks, then given to :meth:`hear`."""
        raise NotImplementedError

    def hear(self, reports: Sequence[int]) -> None:
        """Go on with the checkpoint that is being written, if any.

        Args:
            reports: Of all ranks, in their order.
        """
        raise NotImplementedError

    def wait(self) -> None:
        """Wait until nothing is being written on any rank."""
        raise NotImplementedError

    def write(self, checkpoint: CheckpointView, on_saved: Callable[[], object]) -> None:
        """Write a checkpoint; when this returns, it is on disk, and ``on_saved`` was called.

        Raises:
            CheckpointError: A rank's disk refused it; all ranks raise.
        """
        raise NotImplementedError
