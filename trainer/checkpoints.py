"""The checkpoints of a folder: their order, which are kept, and the lock that keeps a second trainer out.

A file with the final name is whole; a crash while it is written leaves the previous checkpoint in force. The order is
that of the sequence numbers in the names, whatever the clock or the files' times say.
"""

import fcntl
import json
import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from smes.errors import CheckpointError
from smes.schema import Schema
from trainer.checkpoint_file import DAMAGED, Checkpoint, CheckpointView, read_checkpoint, write_checkpoint

_logger = logging.getLogger(__name__)

LOCK = "trainer.lock"
"""Name of the file in the folder that a running trainer holds locked. Between trainers it lies there unlocked."""

_NAME = re.compile(r"step-(\d{12})(?:-(\d{8,15}))?\.safetensors")


class _Entry(NamedTuple):
    """A file of the folder. Sorted: by sequence number, then by step."""

    sequence: int
    step: int
    path: Path


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
        return not self._entries()

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
            for partial in self.directory.glob("*.partial"):
                partial.unlink(missing_ok=True)
            yield
        finally:
            os.close(file)  # and with it the lock

    def _lock(self, path: Path, file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"checkpoint folder {self.directory}: {_holder(path)}, expected a folder of its own for each trainer"
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
            entries = self._entries()
            self._last_sequence = max([self._last_sequence, *(entry.sequence for entry in entries)]) + 1
            path /= f"step-{checkpoint.step:012d}-{self._last_sequence:08d}.safetensors"
            write_checkpoint(path, checkpoint, self._last_sequence)
            for old in self._surplus(entries):
                old.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"checkpoint {path}: not written: {error.strerror or error}") from error
        finally:
            checkpoint.close()
        return path

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
        for entry in self._entries():
            try:
                return read_checkpoint(
                    entry.path, entry.sequence, schema=schema, model=model, only=only, any_schema=any_schema
                )
            except DAMAGED as error:
                _logger.warning("checkpoint %s is damaged, trying the one before it: %s", entry.path, error)
                damaged.append(f"{entry.path.name} ({error})")
                self._damaged.add(entry.path)
        if damaged:
            raise CheckpointError(
                f"checkpoint folder {self.directory}: none can be read: {'; '.join(damaged)}; "
                "expected a backup of one, or another folder and --from-snapshot or --anew"
            )
        return None

    def _entries(self) -> list[_Entry]:
        """Newest first. A name without a sequence number is of an earlier format; it comes after all others."""
        found = []
        for path in self.directory.glob("step-*.safetensors"):
            if name := _NAME.fullmatch(path.name):
                found.append(_Entry(int(name[2] or 0), int(name[1]), path))
        return sorted(found, reverse=True)

    def _surplus(self, before: list[_Entry]) -> list[Path]:
        """The files to remove when one more was written: all after the newest ``keep - 1`` that are not damaged."""
        readable = 0
        for i, entry in enumerate(before):
            if readable == self._keep - 1:
                return [entry.path for entry in before[i:]]
            readable += entry.path not in self._damaged
        return []


def _holder(path: Path) -> str:
    """Who holds a locked folder, from what its lock file says."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"held by process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "held by another process"
