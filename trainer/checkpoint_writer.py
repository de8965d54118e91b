"""Writes checkpoints beside the training, one at a time."""

import logging
import threading
from collections.abc import Callable

from smes.errors import CheckpointError
from smes_io.clock import wall_clock_ms
from trainer.checkpoint_file import CheckpointView
from trainer.checkpoints import CheckpointDirectory

_logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes one checkpoint in a thread of its own. For one thread that starts it and waits for it.

    Attributes:
        saved_ms: When the newest checkpoint was on disk, Unix milliseconds; None before the first one of this process.
        failures: Checkpoints that could not be written.

    Args:
        directory: Where checkpoints go.
    """

    def __init__(self, directory: CheckpointDirectory) -> None:
        self._directory = directory
        self._thread: threading.Thread | None = None
        self.saved_ms: int | None = None
        self.failures = 0

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, checkpoint: CheckpointView, on_saved: Callable[[], object]) -> None:
        """Begin to write a checkpoint, when the one before is done. If it cannot be written, that is logged.

        Args:
            checkpoint: What to write; closed when that is over.
            on_saved: Called by the thread when it is on disk.
        """
        self.wait()
        self._thread = threading.Thread(target=self._write, args=[checkpoint, on_saved], name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def write(self, checkpoint: CheckpointView, on_saved: Callable[[], object]) -> None:
        """Write a checkpoint in this thread, when the one before is done.

        Raises:
            CheckpointError: The disk refused it.
        """
        self.wait()
        self._save(checkpoint)
        on_saved()

    def _save(self, checkpoint: CheckpointView) -> None:
        try:
            self._directory.save(checkpoint)
        except BaseException:
            self.failures += 1
            raise
        self.saved_ms = wall_clock_ms()

    def _write(self, checkpoint: CheckpointView, on_saved: Callable[[], object]) -> None:
        try:
            self._save(checkpoint)
        except CheckpointError as error:
            _logger.error("%s; the checkpoint before it stays valid", error)
        except Exception:  # training goes on; if the last checkpoint cannot be written either, that is raised
            _logger.exception(
                "checkpoint of step %d: not written; the checkpoint before it stays valid", checkpoint.step
            )
        else:
            on_saved()
