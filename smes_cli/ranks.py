"""Which rank of a training this process is, as torchrun says in its environment, and its world.

``smes train --workers N`` starts its ranks by the same launcher (:mod:`smes_cli.launch`). It tells them one thing more:
a folder in which it asks them to stop, and in which each leaves its exit code.
"""

import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from smes.errors import RankLost, SmesError
from smes.world import ALONE, World

FOLDER = "SMES_RANKS_FOLDER"
"""Variable of the environment: the launcher's folder."""
STOP = "stop"
"""Name of the file in it that asks the ranks to stop."""

_LOOK_S = 0.1
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Which rank this is.

    Attributes:
        rank, size: As of :class:`smes.world.World`.
        local_rank: Its number on this machine, ≥ 0.
        folder: The launcher's folder; None where that is torchrun itself.
    """

    rank: int
    size: int
    local_rank: int = 0
    folder: Path | None = None

    def ended(self, code: int) -> None:
        """Leave the exit code for the launcher, which else would start an end by an error again and again."""
        if self.folder is not None:
            (self.folder / f"ended-{self.rank}").write_text(str(code), encoding="utf-8")


def rank_place(environment: Mapping[str, str] = os.environ) -> RankPlace | None:
    """Which rank torchrun says that this process is; None if it was not started as a rank.

    Raises:
        ValueError: What it says is not as expected.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        return None
    try:
        rank, size, local = (int(environment.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except ValueError:
        rank, size, local = -1, 0, 0
    if not 0 <= rank < size:
        raise ValueError(
            f"environment: RANK {environment['RANK']!r}, WORLD_SIZE {environment['WORLD_SIZE']!r}, expected whole "
            "numbers, 0 ≤ RANK < WORLD_SIZE, as torchrun sets them"
        )
    folder = environment.get(FOLDER)
    return RankPlace(rank, size, local, Path(folder) if folder else None)


@contextmanager
def open_world(place: RankPlace | None, *, device: str, timeout_s: float) -> Iterator[World]:
    """The world of this process: of the ranks that torchrun started, or of itself alone.

    Args:
        place: Which rank this is; None: it is alone.
        device: ``cpu`` or ``cuda``: what the ranks compute on.
        timeout_s: How long a rank waits for another one, seconds.

    Raises:
        RankLost: The others did not come in time, or one has gone; not caught within the block, by any of its calls.
    """
    if place is None or place.size == 1:
        yield ALONE
        return
    import torch.distributed as dist

    from smes.process_group import ProcessGroupWorld

    torch_dist: Any = dist  # its stubs leave out what init_process_group takes
    try:
        torch_dist.init_process_group(
            "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", timeout=timedelta(seconds=timeout_s)
        )
    except (RuntimeError, ValueError) as error:
        said = (str(error).splitlines() or ["no message"])[0]
        raise RankLost(f"rank {place.rank} of {place.size}: the ranks did not find each other: {said}") from error
    yield ProcessGroupWorld(torch_dist.group.WORLD)
    torch_dist.destroy_process_group()  # not after an error: it would wait for ranks that are gone


def end_with_parent() -> None:
    """Let the kernel kill this process when the launcher is gone (Linux): no rank stays behind as an orphan."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def hear_stop(folder: Path, stop: Callable[[], object]) -> None:
    """Call ``stop`` when the launcher asks the ranks to stop. It looks in a thread of its own."""

    def look() -> None:
        pause = threading.Event()
        while not (folder / STOP).exists():
            pause.wait(_LOOK_S)
        stop()

    threading.Thread(target=look, name="hear-stop", daemon=True).start()


def log_by_rank(rank: int) -> None:
    """Let every line of the log say which rank it is of."""
    for handler in logging.getLogger().handlers:
        if handler.formatter is not None:
            before = handler.formatter._fmt or "%(message)s"
            handler.setFormatter(logging.Formatter(f"[rank {rank}] {before}"))


def exit_code_of(error: BaseException) -> int:
    """The code with which the command ends after an error, as :mod:`smes_cli.__main__` has it."""
    return 2 if isinstance(error, ValueError) and not isinstance(error, SmesError) else 1
