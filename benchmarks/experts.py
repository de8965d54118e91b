"""The experts on the CPU: compiled loops beside torch's grouped product and beside dense execution, by shape.

    python -m benchmarks.experts --json experts.json

What is timed is the experts' layers with the combination of their outputs for two routers of 4 experts each, forward
and backward in training (B = 1,024), forward alone in scoring (N = 50 and 500). The three forms of execution take turns
in one process, and a ratio is the median of the rounds' own ratios. With one thread the time is the processor's, so
that others on the machine count less.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.speed_ours import DenseExecution
from smes.model.devices import keep_freed_memory
from smes.rankers.sparse import experts as forms
from smes.rankers.sparse.experts import FullExperts, LowRankExperts, ResidualExperts, mixed
from smes.rankers.sparse.packing import Dispatch, dispatch
from smes.rankers.sparse.routing import Selection
from smes.rankers.sparse.stages import Stages

BATCH, CANDIDATES = 1024, (50, 500)
ROUTERS, CHOSEN = 2, 4
WIDTH = 64  # of the encoder's output


@dataclass(frozen=True)
class Shape:
    """Attributes: name, of its figures; experts, E; build, its layers."""

    name: str
    experts: int
    build: Callable[[], nn.Module]


SHAPES = (
    Shape("residual8", 8, lambda: ResidualExperts(8, WIDTH, 64, 32, "none")),  # every expert runs: K = E
    Shape("residual16", 16, lambda: ResidualExperts(16, WIDTH, 64, 32, "none")),
    Shape("residual64", 64, lambda: ResidualExperts(64, WIDTH, 64, 32, "none")),
    Shape("residual256", 256, lambda: ResidualExperts(256, WIDTH, 64, 32, "none")),
    Shape("low_rank64", 64, lambda: LowRankExperts(64, WIDTH, 64, 8, "none")),
    Shape("full64", 64, lambda: FullExperts(64, WIDTH, (64,), "none")),
    Shape("wide64", 64, lambda: FullExperts(64, WIDTH, (128, 64), "none")),
    Shape("wide_layer_norm64", 64, lambda: FullExperts(64, WIDTH, (128, 64), "layer")),
)


def plan_of(rows: int, num_experts: int) -> tuple[Dispatch, Tensor]:
    """A random routing and its weights: each router chooses from its own half of the experts."""
    stages = Stages(
        num_experts=num_experts, group_R=tuple(range(ROUTERS)), num_group=CHOSEN, own_pools=True
    )  # fmt: skip
    z_BRL = torch.randn(rows, ROUTERS, num_experts // ROUTERS, generator=torch.Generator().manual_seed(rows))
    routing = Selection(stages, torch.full((ROUTERS,), 1 / ROUTERS))(z_BRL)
    return dispatch(routing, trim=True), routing.weights_BRK


def work(shape: Shape, rows: int, *, train: bool) -> dict[str, Callable[[], object]]:
    """One pass by compiled loops, by torch's operators, and densely."""
    plan, weights_BRK = plan_of(rows, shape.experts)
    loops = shape.build()
    for parameter in loops.parameters():
        nn.init.normal_(parameter, std=0.1)  # differences start at zero
    h_BD, weights_BRK = torch.randn(rows, WIDTH).requires_grad_(train), weights_BRK.clone().requires_grad_(train)
    goal_BRH = torch.randn(rows, ROUTERS, 64)

    def of(execution: nn.Module) -> Callable[[], object]:
        def one() -> None:
            with torch.set_grad_enabled(train):
                out_BRH = mixed(execution, h_BD, weights_BRK, plan)
            if train:
                loops.zero_grad()
                h_BD.grad = weights_BRK.grad = None
                out_BRH.backward(goal_BRH)  # type: ignore[no-untyped-call]  # torch has no type

        return one

    def by_operators(function: Callable[[], object]) -> Callable[[], object]:
        def one() -> None:
            with _operators():
                function()

        return one

    return {"loops": of(loops), "operators": by_operators(of(loops)), "dense": by_operators(of(DenseExecution(loops)))}


@contextmanager
def _operators() -> Iterator[None]:
    with patch.object(forms, "runs_here", lambda x: False):
        yield


def measure(rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """All figures, flat: ms of the loops, and how many times as long the others take."""
    figures: dict[str, float] = {}
    for shape in SHAPES:
        for kind, rows in (("train", BATCH), *((f"score{n}", n) for n in CANDIDATES)):
            contenders = work(shape, rows, train=kind == "train")
            seconds: dict[str, list[float]] = {name: [] for name in contenders}
            for turn in range(rounds + 1):  # the first warms up
                for name, one in contenders.items():
                    start = clock()
                    one()
                    if turn:
                        seconds[name].append(clock() - start)
            name = f"{shape.name}_{kind}"
            figures[f"{name}_ms"] = statistics.median(seconds["loops"]) * 1e3
            for other in ("operators", "dense"):
                ratios = [a / b for a, b in zip(seconds[other], seconds["loops"], strict=True)]
                figures[f"{name}_vs_{other}"] = statistics.median(ratios)
    return figures


def table(figures: dict[str, float]) -> str:
    """As Markdown."""
    lines = ["| | ms | operators take | dense takes |", "|---|---|---|---|"]
    for name in [name.removesuffix("_ms") for name in figures if name.endswith("_ms")]:
        ms, operators, dense = (figures[f"{name}_{key}"] for key in ("ms", "vs_operators", "vs_dense"))
        lines.append(f"| `{name}` | {ms:.2f} | {operators:.2f} × | {dense:.2f} × |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21, help="of each shape (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    figures = measure(options.rounds, time.process_time if options.threads == 1 else time.perf_counter)
    print(table(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
