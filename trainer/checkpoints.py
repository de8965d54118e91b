"""The checkpoints of a folder: their order, which are kept, and the lock that keeps a second trainer out.

A file with the final name is whole; a crash while it is written leaves the previous checkpoint in force. The order is
that of the sequence numbers in the names, whatever the clock or the files' times say. What several ranks have written
(:mod:`trainer.checkpoint_parts`) is a checkpoint among the others, and is read as if one rank had.
"""

import fcntl
import json
import logging
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from smes.errors import CheckpointError
from smes.schema import Schema
from trainer.checkpoint_file import DAMAGED, Checkpoint, CheckpointView, read_checkpoint, write_checkpoint
from trainer.checkpoint_parts import SHARDED, part_metadata, read_manifest

_logger = logging.getLogger(__name__)

LOCK = "trainer.lock"
"""Name of the file in the folder that a running trainer holds locked. Between trainers it lies there unlocked."""

MANIFEST = ".ranks.json"
"""How the name of a manifest ends."""

_NAME = re.compile(r"step-(\d{12})(?:-(\d{8,15}))?(?:\.safetensors|\.ranks\.json)")
_PART = re.compile(r"step-\d{12}-(\d{8,15})\.[0-9a-f]+\.rank-\d+-of-\d+\.safetensors")


class Entry(NamedTuple):
    """A checkpoint of the folder. Sorted: by sequence number, then by step.

    Attributes:
        sequence, step: As its name says.
        path: Its file, or its manifest.
    """

    sequence: int
    step: int
    path: Path

    @property
    def is_of_ranks(self) -> bool:
        """Whether several ranks have written it."""
        return self.path.name.endswith(MANIFEST)


class CheckpointDirectory:
    """The checkpoints in one folder.

    Args:
        directory: The folder; created if missing.
        keep: How many of the newest readable ones are kept.

    Raises:
        CheckpointError: The folder cannot be created.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory, self._keep = directory, keep
        self._damaged: set[Path] = set()
        self._last_sequence = 0
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"checkpoint folder {directory}: cannot be made: {error.strerror}") from error

    @property
    def is_empty(self) -> bool:
        """Whether the folder has no checkpoint, not even a damaged one."""
        return not self.entries()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other trainer out of the folder, and remove what a killed one left half-written.

        The lock is the operating system's: it ends with the process, however that ends. The file only says who it is.

        Raises:
            CheckpointError: Another trainer holds the folder; the message says who, and since when.
        """
        path = self.directory / LOCK
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error
        try:
            self._lock(path, file)
            for half_written in self.directory.glob("*.partial"):
                half_written.unlink(missing_ok=True)
            self.remove_lost_parts()
            yield
        finally:
            os.close(file)  # and with it the lock

    def _lock(self, path: Path, file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"checkpoint folder {self.directory}: {_holder(path)}, expected a folder of its own for each trainer "
                "or join"
            ) from None
        except OSError as error:
            _logger.warning(
                "checkpoint folder %s: its file system has no locks (%s): make sure that no other trainer uses it",
                self.directory,
                error.strerror,
            )
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat()}
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(holder).encode(), 0)

    def save(self, checkpoint: CheckpointView) -> Path:
        """Write a checkpoint durably as the newest, then remove what is beyond ``keep``. The new one is never removed.

        Raises:
            CheckpointError: The disk refused it; earlier checkpoints stay valid.
        """
        path = self.directory
        try:
            sequence = self.next_sequence()
            path /= f"{stem(checkpoint.step, sequence)}.safetensors"
            write_checkpoint(path, checkpoint, sequence)
            self.remove_surplus(path)
        except OSError as error:
            raise CheckpointError(f"checkpoint {path}: not written: {error.strerror or error}") from error
        finally:
            checkpoint.close()
        return path

    def next_sequence(self) -> int:
        """The sequence number of the next checkpoint, from now on taken."""
        parts = [int(name[1]) for path in self._files() if (name := _PART.fullmatch(path.name))]
        taken = [self._last_sequence, *parts, *(entry.sequence for entry in self.entries())]
        self._last_sequence = max(taken) + 1
        return self._last_sequence

    def newest(
        self, *, schema: Schema, model: dict[str, Any], only: tuple[str, ...] = ("",), any_schema: bool = False
    ) -> Checkpoint | None:
        """The newest checkpoint that is not damaged; None if the folder has no checkpoint.

        Args:
            schema, model, only, any_schema: As :func:`trainer.checkpoint_file.read_checkpoint`.

        Raises:
            SchemaMismatch: It was trained with another schema.
            CheckpointError: It has another format, it was trained with another model configuration, or all checkpoints
                are damaged.
        """
        damaged = []
        for entry in self.entries():
            try:
                return self.read(entry, schema=schema, model=model, only=only, any_schema=any_schema)
            except DAMAGED as error:
                _logger.warning("checkpoint %s is damaged, trying the one before it: %s", entry.path, error)
                damaged.append(f"{entry.path.name} ({error})")
                self.note_damaged(entry)
        if damaged:
            raise self.none_readable(damaged)
        return None

    def read(
        self,
        entry: Entry,
        *,
        schema: Schema,
        model: dict[str, Any],
        only: tuple[str, ...] = ("",),
        any_schema: bool = False,
        rank: int = 0,
        size: int = 1,
    ) -> Checkpoint:
        """What one of ``size`` ranks goes on from; see :func:`trainer.checkpoint_shares.share_of`.

        Of as many ranks as have written it, each reads its own file, and rank 0's without what is sharded. Otherwise
        every rank reads all files. A checkpoint of another schema comes whole, for all ranks.

        Raises:
            SchemaMismatch, CheckpointError: As :meth:`newest`.
            KeyError, ValueError, OSError: A file is damaged or missing.
        """
        read = partial(read_checkpoint, sequence=entry.sequence, schema=schema, model=model, any_schema=any_schema)
        if not entry.is_of_ranks:
            whole = read(entry.path, only=only)
            return whole if size == 1 or whole.schema_hash != schema.hash else _share([whole], rank, size)
        manifest = read_manifest(entry.path, entry.sequence)

        def part(k: int, without: tuple[str, ...] = ()) -> Checkpoint:
            path, expected = entry.path.with_name(manifest[k].name), part_metadata(k, len(manifest))
            try:
                return read(path, only=only, without=without, part={**expected, "checksum": manifest[k].checksum})
            except DAMAGED as error:
                raise ValueError(f"{path.name}: {error}") from error

        is_shared_alike = len(manifest) == size
        own = part(rank if is_shared_alike else 0)
        if own.schema_hash != schema.hash:
            rank, size = 0, 1
        elif is_shared_alike:
            return own if rank == 0 else replace(rank_0 := part(0, without=SHARDED), arrays=rank_0.arrays | own.arrays)
        return _share([part(k) for k in range(len(manifest))], rank, size)

    def note_damaged(self, entry: Entry) -> None:
        """Do not count a checkpoint among those that are kept."""
        self._damaged.add(entry.path)

    def none_readable(self, damaged: Sequence[str]) -> CheckpointError:
        """What to raise where every checkpoint is damaged."""
        return CheckpointError(
            f"checkpoint folder {self.directory}: none can be read: {'; '.join(damaged)}; "
            "expected a backup of one, or another folder and --from-snapshot or --anew"
        )

    def entries(self) -> list[Entry]:
        """Newest first. A name without a sequence number is of an earlier format; it comes after all others."""
        found = []
        for path in self._files():
            if name := _NAME.fullmatch(path.name):
                found.append(Entry(int(name[2] or 0), int(name[1]), path))
        return sorted(found, reverse=True)

    def remove_surplus(self, newest: Path) -> None:
        """Remove what is beyond ``keep``, and parts that belong to no checkpoint.

        Args:
            newest: The checkpoint that was just written; it is never removed.
        """
        for old in self._surplus([entry for entry in self.entries() if entry.path != newest]):
            old.path.unlink(missing_ok=True)
        self.remove_lost_parts()

    def remove_lost_parts(self) -> None:
        """Remove the parts of checkpoints that have no manifest any more, or never got one."""
        whole = {entry.sequence for entry in self.entries() if entry.is_of_ranks}
        for path in self._files():
            if (name := _PART.fullmatch(path.name)) and int(name[1]) not in whole:
                path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return list(self.directory.glob("step-*"))

    def _surplus(self, before: list[Entry]) -> list[Entry]:
        """Those to remove when one more was written: all after the newest ``keep - 1`` that are not damaged."""
        readable = 0
        for i, entry in enumerate(before):
            if readable == self._keep - 1:
                return before[i:]
            readable += entry.path not in self._damaged
        return []


def _share(parts: Sequence[Checkpoint], rank: int, size: int) -> Checkpoint:
    from trainer.checkpoint_shares import share_of  # a start loads what it uses

    return share_of(parts, rank, size)


def stem(step: int, sequence: int) -> str:
    """Name of a checkpoint, without an ending."""
    return f"step-{step:012d}-{sequence:08d}"


def _holder(path: Path) -> str:
    """Who holds a locked folder, from what its lock file says."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"held by process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "held by another process"
