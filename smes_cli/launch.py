"""Start the ranks of a training on this machine, and again when one dies: torchrun, called as a library."""

import fcntl
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from smes.errors import SmesError
from smes_cli.command_line import stop_signals
from smes_cli.compile_loops import compile_missing
from smes_cli.ranks import FOLDER, STOP

_logger = logging.getLogger(__name__)
_END_S = 10  # so long ranks that are told to end may take before they are killed


def launch(ranks: int, arguments: Sequence[str], *, max_restarts: int) -> int:
    """Run ``smes ARGUMENTS`` as so many ranks; returns the exit code that they ended with.

    SIGINT and SIGTERM ask the ranks to stop, and are waited for. When a rank dies, the others are ended, and all are
    started again: they go on from their checkpoint.

    Args:
        ranks: How many, ≥ 2.
        arguments: Of the command.
        max_restarts: How often they are started again in all, ≥ 0.

    Raises:
        SmesError: A rank died, and they were started again that often already.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    compile_missing()  # or each rank would, all at the same time
    logging.getLogger("torch.distributed.elastic").setLevel(logging.WARNING)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=max_restarts,
        monitor_interval=0.1,
        signals_to_handle="SIGHUP",  # those of a stop are handled here
        shutdown_timeout=_END_S,
    )
    start: Any = elastic_launch(config, sys.executable)
    with _folder() as folder, _asking_to_stop(folder):
        try:
            start("-P", "-m", "smes_cli", *arguments)
        except ChildFailedError as failed:
            rank, failure = failed.get_first_failure()
            raise SmesError(f"{_death(rank, failure.exitcode)}, after {max_restarts} restarts") from failed
        codes = [int(path.read_text(encoding="utf-8")) for path in folder.glob("ended-*")]
    return max(codes, default=0)


@contextmanager
def _folder() -> Iterator[Path]:
    """The folder by which launcher and ranks know of each other."""
    folder = Path(tempfile.mkdtemp(prefix="smes-ranks-"))
    os.environ[FOLDER] = str(folder)
    lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)  # what cleans folders of temporary files leaves locked ones alone
        yield folder
    finally:
        os.close(lock)
        del os.environ[FOLDER]
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _asking_to_stop(folder: Path) -> Iterator[None]:
    """Pass a stop signal within the block on to the ranks, also to those that are started after it.

    They may not hear signals yet: a rank that still imports its libraries would be ended by one.
    """
    with stop_signals() as stopped:

        def ask() -> None:
            stopped.wait()
            with suppress(OSError):  # all is over
                (folder / STOP).touch()

        thread = threading.Thread(target=ask, name="ask-ranks-to-stop", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()


def _death(rank: int, code: int) -> str:
    if code < 0:
        return f"rank {rank} was ended by {signal.Signals(-code).name}"
    return f"rank {rank} ended with exit code {code}"
