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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from smes.errors import WRONG_INPUT, RankLost, SmesError
from smes_cli.console import console, errors

if TYPE_CHECKING:
    from smes.process_group import ProcessGroupWorld
    from smes.world import World
    from smes_cli.command_line import StopRequest
    from smes_cli.config import Config

_logger = logging.getLogger(__name__)

FOLDER = "RANKS_FOLDER"
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

    def begins(self) -> None:
        """Take back the exit code that this rank has left before the launcher started it again."""
        if self.folder is not None:
            self._told.unlink(missing_ok=True)

    @property
    def others_ended(self) -> bool:
        """Whether another rank has left its exit code: it met an error, and said which."""
        return self.folder is not None and any(self.folder.glob("ended-*"))

    def ended(self, code: int) -> None:
        """Leave the exit code for the launcher, which else would start an end by an error again and again."""
        if self.folder is not None:
            self._told.write_text(str(code), encoding="utf-8")

    @property
    def _told(self) -> Path:
        assert self.folder is not None, "the launcher has told it"
        return self.folder / f"ended-{self.rank}"


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


def begin_rank(place: RankPlace) -> None:
    """Set up a process that is one of several ranks: it ends with its launcher, and says which rank it is.

    Only rank 0 prints what is not about itself alone.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    console.quiet = console.quiet or place.rank > 0
    for handler in logging.getLogger().handlers:
        before = handler.formatter._fmt if handler.formatter is not None else None
        handler.setFormatter(logging.Formatter(f"[rank {place.rank}] {before or '%(message)s'}"))
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if place.rank == 0 and restarts != "0":
        most = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "?")
        _logger.warning("a rank died: all go on from the newest checkpoint (restart %s of %s)", restarts, most)


@contextmanager
def as_rank(place: RankPlace | None, config: "Config", should_stop: "StopRequest") -> "Iterator[World]":
    """Run a block as this rank, with its world.

    An error ends the ranks together, and the launcher does not start them again; it does when one dies.

    Args:
        place: Which rank this is; None: it is alone.
        config: Says on what the ranks compute, and how long they wait for each other.
        should_stop: Set when the launcher asks for a stop.

    Raises:
        RankLost: Another rank has gone, and neither by a stop nor by an error that it has told.
        typer.Exit: The block met an error, which is printed.
    """
    from smes.world import ALONE  # with torch, which other commands do not import

    if place is None or place.size == 1:
        yield ALONE
        return
    if place.folder is not None:
        _hear_stop(place.folder, should_stop)
    place.begins()
    world, is_good = None, False
    try:
        yield (world := _open_world(place, config))
    except RankLost as lost:
        if not should_stop() and not place.others_ended:
            raise
        _logger.warning("%s", lost)
        place.ended(0 if should_stop() else 1)
    except (SmesError, ValueError, OSError) as error:
        if place.folder is None:
            raise
        of_rank = f"[rank {place.rank}] " if place.rank else ""
        errors.print(f"{of_rank}smes: {error}", highlight=False, soft_wrap=True)
        place.ended(2 if isinstance(error, WRONG_INPUT) else 1)
    else:
        is_good = True
        place.ended(0)
        return
    finally:  # when the end is told: then the others lose this rank
        if world is not None:
            _let_go(world, is_good=is_good)
    raise typer.Exit(0)


def _open_world(place: RankPlace, config: "Config") -> "ProcessGroupWorld":
    import torch
    import torch.distributed as dist

    from smes.process_group import ProcessGroupWorld

    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
    device = config.trainer.open_device()
    torch_dist: Any = dist  # its stubs leave out what these functions take
    backend, timeout = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl", config.trainer.rank_timeout_s
    try:
        store, rank, size = next(torch_dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # The launcher's store stays from one start of the ranks to the next, and with it their old addresses.
            store = torch_dist.PrefixStore(f"start-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
            if rank == 0 and os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
                _logger.warning(
                    "torchrun on several machines: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for it, or ranks that it "
                    "starts again may not find each other"
                )
        torch_dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
        )
    except (RuntimeError, ValueError) as error:
        said = (str(error).splitlines() or ["no message"])[0]
        raise RankLost(f"rank {place.rank} of {place.size}: the ranks did not find each other: {said}") from error
    return ProcessGroupWorld(torch_dist.group.WORLD)


def _let_go(world: "ProcessGroupWorld", *, is_good: bool) -> None:
    """Let go of the process group: one of gloo that lives when the interpreter ends may abort the process."""
    import torch.distributed as dist

    torch_dist: Any = dist
    if is_good or torch_dist.get_backend() == "gloo":  # NCCL would wait for ranks that are gone
        torch_dist.destroy_process_group()
    world.close()


def _hear_stop(folder: Path, should_stop: "StopRequest") -> None:
    """Hear when the launcher asks the ranks to stop, in a thread of its own."""

    def look() -> None:
        pause = threading.Event()
        while not (folder / STOP).exists():
            pause.wait(_LOOK_S)
        should_stop.set()

    threading.Thread(target=look, name="hear-stop", daemon=True).start()


def require_shareable(config: "Config", ranks: int) -> None:
    """Check that a configuration can be trained by several ranks.

    Raises:
        ValueError: It cannot; the message says which key is in the way.
    """
    if ranks > 1 and config.trainer.gate.enabled:
        raise ValueError(
            f"trainer.gate.enabled: true, expected false with {ranks} ranks: the gate scores with frozen copies of the "
            "weights, and no rank has all rows"
        )
    if config.stream.batch.size < ranks:
        raise ValueError(
            f"stream.batch.size: {config.stream.batch.size}, expected at least {ranks}, one example for each rank"
        )
