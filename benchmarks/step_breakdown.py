"""Where a training step's time goes on the CPU, how many floating-point operations it does, and what the machine can.

The functions that make up a step are wrapped by a stopwatch that counts for each only the time that is not spent in
another of them. On the CPU every call returns when its work is done, so the parts add up to the step.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode

from smes.model.devices import RankBatch
from smes.model.features import FeatureLayer
from smes.model.fused_adam import FusedAdam
from smes.model.learner import Learner
from smes.model.numeric_moments import NumericMoments
from smes.model.table_host import HostTable
from smes.model.task_heads import TaskHeads
from smes.model.task_outputs import TaskOutputs
from smes.rankers.ranker import Encoder
from smes.rankers.sparse import experts, packing, routing
from smes.rankers.sparse.experts import FullExperts, LowRankExperts, ResidualExperts
from smes.rankers.sparse.ranker import SMES
from smes.rankers.sparse.router import Router
from smes.rankers.sparse.routing import EarlyChoice

PARTS = (
    "prepare",  # ids to rows, distinct rows
    "features",
    "encoder",  # with the trunk, and the routers' first map where one product reads the input for both
    "route",  # routers, selection, load and balance loss
    "pack",
    "gemm",  # layers of the experts, forward, and the sums of their outputs; in loops, packing and activation, too
    "experts",  # GEMMs common to all experts; norms and activations where torch's operators run
    "heads",  # with scores, losses, base rates, and what rare tasks have of their own
    "backward",
    "optimiser",  # AdamW, the rows' gradients and their Adagrad
    "other",
)

_FUNCTIONS: tuple[tuple[str, Any, str], ...] = (
    ("route", routing, "expert_load"),
    ("pack", packing, "dispatch"),
    ("pack", packing, "pack"),
    ("gemm", experts, "grouped_linear"),
    ("gemm", experts, "expert_layer"),
    ("gemm", experts, "mixture"),
    ("gemm", packing, "combine"),
)
_METHODS: tuple[tuple[str, Any, str], ...] = (
    ("prepare", Learner, "prepare"),
    ("features", HostTable, "cells"),
    ("features", RankBatch, "inputs"),
    ("features", FeatureLayer, "forward"),
    ("features", NumericMoments, "observe"),
    ("encoder", Encoder, "forward"),
    ("encoder", SMES, "_read"),
    ("route", Router, "forward"),
    ("route", Router, "after_product"),
    ("route", EarlyChoice, "forward"),
    ("route", SMES, "balance"),
    ("experts", FullExperts, "forward"),
    ("experts", FullExperts, "last_layer"),
    ("experts", LowRankExperts, "forward"),
    ("experts", LowRankExperts, "last_layer"),
    ("experts", ResidualExperts, "forward"),
    ("experts", ResidualExperts, "last_layer"),
    ("heads", TaskHeads, "forward"),
    ("heads", TaskHeads, "of_streams"),
    ("heads", TaskOutputs, "rates"),
    ("heads", TaskOutputs, "with_borrowed"),
    ("heads", TaskOutputs, "scores"),
    ("heads", TaskOutputs, "loss"),
    ("heads", TaskOutputs, "observe"),
    ("backward", torch.Tensor, "backward"),
    ("optimiser", FusedAdam, "step"),
    ("optimiser", FusedAdam, "clear"),
    ("optimiser", HostTable, "gradients"),
    ("optimiser", HostTable, "update"),
)


class Stopwatch:
    """Seconds by part, each without the parts inside it.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = clock
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside to ``name``."""
        self._switch()
        self._running.append(name)
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted to ``name``."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return timed

    def _switch(self) -> None:
        now = self._clock()
        if self._running:
            self.seconds[self._running[-1]] = self.seconds.get(self._running[-1], 0.0) + now - self._since
        self._since = now


def breakdown(step: Callable[[int], object], steps: int) -> dict[str, float]:
    """Mean seconds of each of :data:`PARTS` over some steps of a learner with a SMES ranker.

    Args:
        step: Prepares the n-th batch and takes a step on it.
        steps: How many, ≥ 1.
    """
    watch = Stopwatch()
    with _watched(watch):
        for n in range(steps):
            with watch.part("other"):
                step(n)
    return {part: watch.seconds.get(part, 0.0) / steps for part in PARTS}


@contextmanager
def _watched(watch: Stopwatch) -> Iterator[None]:
    with ExitStack() as stack:
        for part, owner, name in _METHODS:
            stack.enter_context(patch.object(owner, name, watch.wrap(part, getattr(owner, name))))
        for part, home, name in _FUNCTIONS:
            function = getattr(home, name)
            timed = watch.wrap(part, function)
            # A function is called by the name that its caller imported it under.
            for module in [m for key, m in sys.modules.items() if key.startswith("smes.")]:
                if getattr(module, name, None) is function:
                    stack.enter_context(patch.object(module, name, timed))
        yield


def count_flop(work: Callable[[], object]) -> int:
    """Floating-point operations of all matrix products done meanwhile, backward passes and grouped ones included."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped_flop}) as counter:
        work()
    return int(counter.get_total_flops())


def _grouped_flop(a: Any, b: Any, *_: Any, **__: Any) -> int:
    """Rows times stacked matrices, [P, D] × [E, D, H], or its weights' gradient, [D, P] × [P, H] by segments of P."""
    return int(2 * a[0] * a[1] * b[-1])


def gemm_flop_per_s(size: int = 1024, repeats: int = 7) -> float:
    """What the machine reaches in one large fp32 GEMM with torch's current number of threads; the median."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)
    torch.mm(a, b, out=out)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        seconds.append(time.perf_counter() - start)
    return float(2 * size**3 / statistics.median(seconds))
