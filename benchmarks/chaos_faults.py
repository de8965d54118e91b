"""What is done to the system: one fault after the other, in a seeded order, at seeded moments.

A disk that is full is a file system of its own with the trainer's checkpoints, which is filled to the last byte. Where
it cannot be mounted, the kernel limits the length of the trainer's files instead. The clock that jumps is that of
trainer and scorers (:mod:`benchmarks.chaos_clock`), not that of the servers.
"""

import errno
import resource
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

Kind = Literal[
    "broker killed", "store killed", "trainer killed", "scorer killed",
    "broker stopped", "store stopped", "trainer stopped", "scorer stopped",
    "disk full", "clock ahead", "clock back",
]  # fmt: skip

# (What, how many times, for how many seconds.)
_FAULTS: tuple[tuple[Kind, int, float], ...] = (
    ("broker killed", 3, 10.0),
    ("store killed", 3, 10.0),
    ("trainer killed", 2, 0.0),
    ("scorer killed", 2, 2.0),
    ("broker stopped", 1, 20.0),
    ("store stopped", 1, 20.0),
    ("trainer stopped", 1, 20.0),
    ("scorer stopped", 1, 20.0),
    ("disk full", 1, 10.0),
    ("clock ahead", 1, 10.0),
    ("clock back", 1, 10.0),
)
_DISK_BYTES = 256 * 1024 * 1024
_LIMITED_BYTES = 64 * 1024
CLOCK_JUMPS_S: dict[str, int] = {"clock ahead": 3600, "clock back": -7200}


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        kind: What.
        seconds: How long it lasts.
        pause_s: Before it, since the end of the one before.
    """

    kind: Kind
    seconds: float
    pause_s: float


def plan(seed: int, *, time_scale: float = 1.0, only: tuple[Kind, ...] | None = None) -> list[Fault]:
    """The faults in a seeded order, with pauses of 2 … 5 s, all times multiplied by ``time_scale``.

    Args:
        seed: Of order and pauses.
        time_scale: 1 as the figures are measured.
        only: These kinds, each once; None: all, each as often as it is in the table.
    """
    rng = np.random.default_rng(seed)
    chosen = [
        (kind, seconds)
        for kind, times, seconds in _FAULTS
        for _ in range(times if only is None else 1)
        if only is None or kind in only
    ]
    return [
        Fault(chosen[i][0], time_scale * chosen[i][1], time_scale * float(rng.uniform(2, 5)))
        for i in rng.permutation(len(chosen))
    ]


def seconds_of(faults: list[Fault]) -> float:
    """How long they and their pauses take, without what a restart takes."""
    return sum(fault.seconds + fault.pause_s for fault in faults)


@dataclass(frozen=True)
class Disk:
    """The file system of the checkpoints.

    Attributes:
        folder: Where it is mounted, or a folder of the common file system.
        is_mounted: Whether it is one of its own.
    """

    folder: Path
    is_mounted: bool

    @property
    def way(self) -> str:
        """How it is made full, in words."""
        return "tmpfs filled to the last byte" if self.is_mounted else "RLIMIT_FSIZE of the trainer"

    @contextmanager
    def full(self, trainer_pid: int) -> Iterator[None]:
        """No more fits into it inside."""
        if not self.is_mounted:
            before = resource.prlimit(trainer_pid, resource.RLIMIT_FSIZE)
            resource.prlimit(trainer_pid, resource.RLIMIT_FSIZE, (_LIMITED_BYTES, before[1]))
            try:
                yield
            finally:
                resource.prlimit(trainer_pid, resource.RLIMIT_FSIZE, before)
            return
        filler = self.folder / "filler"
        try:
            _fill(filler)
            yield
        finally:
            filler.unlink(missing_ok=True)


def _fill(filler: Path) -> None:
    block = bytes(64 * 1024)
    with filler.open("wb", buffering=0) as file:
        while True:
            try:
                if not file.write(block):
                    return
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                return


def make_disk(folder: Path, stack: ExitStack) -> Disk:
    """A small file system in memory at ``folder``, unmounted with the stack; the plain folder if that is refused."""
    folder.mkdir(parents=True, exist_ok=True)
    argv = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(argv, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if mounted:
        stack.callback(subprocess.run, ["umount", "--lazy", str(folder)], capture_output=True, check=False)
    return Disk(folder, mounted)


class Clock:
    """The wall clock of processes that are started with it.

    Args:
        file: What says by how much it is moved.

    Attributes:
        launcher: For their command line.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.launcher = (str(Path(__file__).with_name("chaos_clock.py")), str(file))
        self.set(0)

    def set(self, offset_s: int) -> None:
        """Move the clock to so many seconds from the true time."""
        partial = self._file.with_suffix(".partial")
        partial.write_text(f"{offset_s:+d}")
        partial.replace(self._file)
