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
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
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
from trainer.checkpoints import LOCK, MANIFEST, CheckpointDirectory, Entry, stem

_logger = logging.getLogger(__name__)

_VISIBLE_S = 10.0  # a network file system may show what another machine has written later
_TURN_S = 1.0  # ranks that wait tell each other so often that they live
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

    @property
    def manifest(self) -> str:
        """Name of its manifest."""
        return stem(self.step, self.sequence) + MANIFEST


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
        with ExitStack() as lock:
            holder, problem = "", ""
            if self._world.rank == 0:
                try:
                    lock.enter_context(self.directory.locked())
                    holder = _flushed(self.directory.directory / LOCK)
                except (CheckpointError, OSError) as error:
                    problem = str(error)
            holder, problem = self._all([holder, problem])[0]
            if problem:
                raise CheckpointError(problem)
            for problem in self._all(self._not_seen(holder)):
                if problem:
                    raise CheckpointError(problem)
            yield

    def _not_seen(self, holder: str) -> str:
        """What is wrong with the folder as this rank sees it; empty: it is that of rank 0."""
        path = self.directory.directory / LOCK
        if wait_until(lambda: _text(path) == holder, timeout_s=_VISIBLE_S):
            return ""
        return (
            f"checkpoint folder {self.directory.directory}: rank {self._world.rank} on {socket.gethostname()} does not "
            "see what rank 0 writes there, expected one folder for all ranks, on a network file system where they are "
            "on several machines"
        )

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
        damaged: list[str] = []
        for entry in self._entries():
            found, why, failure = None, "", None
            try:
                found = self._read(entry, schema, model, carried_over)
            except DAMAGED as error:
                _logger.warning("checkpoint %s is damaged, trying the one before it: %s", entry.path, error)
                why = f"{entry.path.name} ({error})"
            except SmesError as error:
                failure = error
            heard = self._all([why, str(failure or "")])
            if failure is not None:
                raise failure
            if failures := [text for _, text in heard if text]:
                raise CheckpointError(failures[0])
            if not (reasons := [text for text, _ in heard if text]):
                return found
            damaged.append(reasons[0])
            self.directory.note_damaged(entry)
        if damaged:
            raise self.directory.none_readable(damaged)
        return None

    def _entries(self) -> list[Entry]:
        """The checkpoints that rank 0 sees, newest first."""
        own = [[entry.sequence, entry.step, entry.path.name] for entry in self.directory.entries()]
        folder = self.directory.directory
        return [Entry(sequence, step, folder / name) for sequence, step, name in self._all(own)[0]]

    def _read(
        self,
        entry: Entry,
        schema: Schema,
        model: dict[str, Any],
        carried_over: Callable[[Checkpoint], Checkpoint] | None,
    ) -> Checkpoint:
        rank, size, any_schema = self._world.rank, self._world.size, carried_over is not None
        found = self.directory.read(entry, schema=schema, model=model, any_schema=any_schema, rank=rank, size=size)
        if found.schema_hash == schema.hash:
            return found
        assert carried_over is not None, "else it was refused"
        try:
            return share_of([carried_over(found)], rank, size)
        except ValueError as error:
            raise CheckpointError(f"{entry.path}: cannot be carried over: {error}") from error

    def begin(self, step: int) -> Attempt:
        """Agree with the other ranks on the next checkpoint.

        Raises:
            CheckpointError: The ranks are at different steps; all raise it.
            OSError: Rank 0 cannot read the folder. It raises alone, and its end ends the others.
        """
        own = [step, self.directory.next_sequence() if self._world.rank == 0 else 0, secrets.token_hex(4)]
        told = self._all(own)
        if len(steps := {step for step, _, _ in told}) > 1:
            raise CheckpointError(f"checkpoint: the ranks are at steps {sorted(steps)}, expected all at one")
        _, sequence, attempt = told[0]
        name, size = stem(step, sequence), self._world.size
        return Attempt(step, sequence, [part_name(name, attempt, rank, size) for rank in range(size)])

    def _all(self, value: Any) -> list[Any]:
        """What all ranks have to say, as far as JSON can, in their order."""
        heard = self._world.collect(json.dumps(value).encode())
        told: list[Any] = json.loads(self._world.broadcast(b"[%s]" % b",".join(heard)))
        return told


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
        self._checkpoints, self._world = checkpoints, world
        self._folder = checkpoints.directory.directory
        self._attempt: Attempt | None = None
        self._on_saved: Callable[[], object] = lambda: None
        self._thread: threading.Thread | None = None
        self._state = _WRITING
        self._problem: str | None = None
        self.saved_ms: int | None = None
        self.failures = 0

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written; the same on all ranks."""
        return self._attempt is not None

    def start(self, checkpoint: CheckpointView, on_saved: Callable[[], object]) -> None:
        """Begin to write a checkpoint of this step, when the one before is done.

        If it cannot be written, that is logged, and the checkpoint before it stays valid.

        Args:
            checkpoint: This rank's part; closed when it was written or could not be.
            on_saved: Called by :meth:`hear` when the whole checkpoint is on disk.

        Raises:
            CheckpointError: The ranks are at different steps.
        """
        self.wait()
        try:
            self._attempt = attempt = self._checkpoints.begin(checkpoint.step)
        except BaseException:
            checkpoint.close()
            raise
        self._on_saved, self._problem = on_saved, None
        self._run(lambda: self._write_part(checkpoint, attempt))

    def report(self) -> int:
        """What the other ranks have to know in this turn: to be gathered from all ranks, then given to :meth:`hear`.

        Small and ≥ 0; 0 while there is nothing to decide.
        """
        return self._state

    def hear(self, reports: Sequence[int]) -> None:
        """Go on with the checkpoint that is being written, if any.

        Args:
            reports: Of all ranks, in their order.
        """
        attempt = self._attempt
        if attempt is None or _WRITING in reports:
            return
        if _FAILED in reports:
            self._give_up(attempt, list(reports).index(_FAILED))
        elif reports[0] == _COMMITTED:
            self._attempt, self._state = None, _WRITING
            self.saved_ms = wall_clock_ms()
            self._on_saved()
        elif self._world.rank == 0:
            self._run(lambda: self._commit(attempt))

    def wait(self) -> None:
        """Wait until nothing is being written on any rank."""
        while self._attempt is not None:
            if self._thread is not None:
                self._thread.join(_TURN_S)
            self.hear([int(report) for report in torch.cat(self._world.gather(torch.tensor([self.report()])))])

    def write(self, checkpoint: CheckpointView, on_saved: Callable[[], object]) -> None:
        """Write a checkpoint; when this returns, it is on disk, and ``on_saved`` was called.

        Raises:
            CheckpointError: A rank's disk refused it; all ranks raise. Earlier checkpoints stay valid.
        """
        self.start(checkpoint, on_saved)
        self.wait()
        if self._problem is not None:
            raise CheckpointError(self._problem)

    def _run(self, work: Callable[[], int]) -> None:
        """Do something in a thread, whose result is then this rank's state; if it raises, the attempt has failed."""

        def run() -> None:
            state = _FAILED
            try:
                state = work()
            except Exception as error:  # training goes on; if the last one cannot be written either, that is raised
                _logger.exception("checkpoint: not written")
                self._problem = f"checkpoint in {self._folder}: not written: {error!r}"
            finally:
                self._state = state

        self._state = _WRITING
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def _write_part(self, checkpoint: CheckpointView, attempt: Attempt) -> int:
        path, part = self._folder / attempt.parts[self._world.rank], part_metadata(self._world.rank, self._world.size)
        try:
            write_checkpoint(path, checkpoint, attempt.sequence, part)
        except OSError as error:
            self._problem = f"checkpoint {path}: not written: {error.strerror or error}"
        else:
            return _WRITTEN
        finally:
            checkpoint.close()
        return _FAILED

    def _commit(self, attempt: Attempt) -> int:
        path, directory = self._folder / attempt.manifest, self._checkpoints.directory
        try:
            write_manifest(path, attempt.parts, attempt.sequence, attempt.step)
        except DAMAGED as error:
            self._problem = f"checkpoint {path}: not written: {getattr(error, 'strerror', None) or error}"
            return _FAILED
        try:
            directory.remove_surplus(path)
        except OSError as error:
            _logger.error("checkpoint folder %s: older ones are not removed: %s", self._folder, error.strerror)
        return _COMMITTED

    def _give_up(self, attempt: Attempt, rank: int) -> None:
        """End an attempt that a rank could not finish."""
        self._attempt, self._state = None, _WRITING
        self.failures += 1
        if self._problem is None:
            self._problem = f"checkpoint of step {attempt.step}: not written by rank {rank}, whose log says why"
        _logger.error("%s; the checkpoint before it stays valid", self._problem)
        with suppress(OSError):
            (self._folder / attempt.parts[self._world.rank]).unlink(missing_ok=True)


def _flushed(path: Path) -> str:
    """The text of a file, which other machines see from now on."""
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
    return path.read_text(encoding="utf-8")


def _text(path: Path) -> str | None:
    """The text of a file; None if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
