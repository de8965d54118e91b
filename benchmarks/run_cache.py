"""Runs that are done once: results on disk under what they depend on, the missing ones spread over processes.

The key of a run holds all its settings, but not the version of the code: use another folder after a code change.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class RunResult:
    """Attributes: arrays, by name; facts, what JSON can hold."""

    arrays: Mapping[str, NDArray[Any]]
    facts: Mapping[str, Any]


class Run(Protocol):
    """One ranker with one seed on one stream, or the stream's own truth; goes to another process by pickle.

    Attributes:
        title: For people.
        key: Different for runs that differ in anything; part of a file name.
    """

    @property
    def title(self) -> str: ...

    @property
    def key(self) -> str: ...

    def execute(self, cache: "RunCache") -> RunResult:
        """Do it; what is too large for memory may go to files of its own in the cache's folder."""


class RunCache:
    """Results in a folder.

    Args:
        folder: Made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def has(self, run: Run) -> bool:
        return self._path(run).exists()

    def load(self, run: Run) -> RunResult:
        """The result of a run that :meth:`has` is true for."""
        with np.load(self._path(run), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        return RunResult(arrays, json.loads(str(arrays.pop("facts"))))

    def save(self, run: Run, result: RunResult) -> None:
        """All or nothing."""
        path = self._path(run)
        unfinished = path.with_suffix(".unfinished.npz")
        np.savez(unfinished, allow_pickle=False, facts=np.array(json.dumps(result.facts)), **result.arrays)
        unfinished.replace(path)

    def _path(self, run: Run) -> Path:
        return self.folder / f"{run.key}.npz"


def run_missing(runs: Sequence[Run], cache: RunCache, processes: int) -> None:
    """Execute the runs that the cache has not, in single-threaded processes; each line says what is done.

    Args:
        runs: In the order in which they start.
        cache: Where results go; what is there already is not done again.
        processes: How many at once; 1 stays in this process.
    """
    missing = list({run.key: run for run in runs if not cache.has(run)}.values())
    if not missing:
        return
    started_s = time.monotonic()
    for done, (title, seconds) in enumerate(_executed(missing, cache.folder, processes), start=1):
        passed_min = (time.monotonic() - started_s) / 60
        print(f"{done} of {len(missing)}: {title} in {seconds:,.0f} s; {passed_min:,.1f} min so far", flush=True)


def _executed(runs: Sequence[Run], folder: Path, processes: int) -> Iterator[tuple[str, float]]:
    if processes == 1:
        with _single_threaded():
            for run in runs:
                yield _execute(run, folder)
        return
    # Children read these before torch starts its threads.
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"))
    try:
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's locks
        with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
            futures = [pool.submit(_execute, run, folder) for run in runs]
            try:
                for future in as_completed(futures):
                    yield future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _execute(run: Run, folder: Path) -> tuple[str, float]:
    started_s = time.monotonic()
    cache = RunCache(folder)
    cache.save(run, run.execute(cache))
    return run.title, time.monotonic() - started_s


@contextmanager
def _single_threaded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
