"""Ranks for tests: threads of this process, between which gloo carries the tensors over real sockets."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from smes.process_group import ProcessGroupWorld
from smes.world import ALONE, World

T = TypeVar("T")


def on_ranks(size: int, work: Callable[[World], T], timeout_s: float = 30.0) -> list[T]:
    """Do something on each rank of a world, at the same time; what they return, in the order of the ranks.

    Args:
        size: N, how many ranks.
        work: What each does.
        timeout_s: How long a rank waits for another one.

    Raises:
        Exception: That of the first rank that raised one by itself: the others then only report that it went.
    """
    if size == 1:
        return [work(ALONE)]
    torch_dist: Any = dist  # its stubs do not list these
    store = torch_dist.HashStore()
    failed: list[BaseException] = []
    lock = threading.Lock()

    def run(rank: int) -> T:
        torch.set_num_threads(1)
        group = torch_dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=timeout_s))
        world = ProcessGroupWorld(group)
        try:
            return work(world)
        except BaseException as error:
            with lock:
                failed.append(error)
            raise
        finally:
            world.close()

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    if failed:
        raise failed[0]
    return [future.result() for future in futures]
