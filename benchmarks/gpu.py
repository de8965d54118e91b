"""Training samples/s on a GPU by batch size and number of experts, against a dense execution and the card's own rates.

    python -m benchmarks.gpu                       # needs a CUDA GPU, torch ≥ 2.11, and this repository
    python -m benchmarks.gpu --json gpu.json

The model is the preset `large` with so many experts, and without more of them at first. Each row trains it twice on
prepared columns, ids looked up and copied to the device on the way: once with the grouped execution, once with every
expert run on every instance. `TFLOP/s` counts the multiply-adds of encoder, trunk (if there is one) and experts that
were executed, forward and backward; the card's own bf16 GEMM and copy rates are measured in the same run.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from smes.events import ExampleBlock
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.learner import Learner
from smes.rankers.sparse.config import EarlyConfig, SmesConfig, smes_large
from smes.rankers.sparse.experts import EXPERT_FORMS, FullExperts
from smes.rankers.sparse.packing import Dispatch
from smes.schema import Feature, Schema, Task

_SCHEMA = Schema(
    "gpu-benchmark",
    tasks=(*(Task(f"task{i}") for i in range(8)), Task("watch", kind="regression")),
    features=tuple(Feature(f"field{i}") for i in range(38)),
)


class DenseExperts(FullExperts):
    """Every expert on every instance; the rows that the routing asks for are then picked out."""

    def forward(self, h_BD: Tensor, plan: Dispatch) -> Tensor:
        x_EBD = h_BD.unsqueeze(0).expand(len(self.weights[0]), *h_BD.shape)
        for weight_E in self.weights:
            y_EBH = torch.bmm(x_EBD, weight_E)
            x_EBD = F.silu(self.norm(y_EBH.flatten(0, 1))).view(y_EBH.shape)
        row_P = torch.arange(len(plan.instance_P), device=h_BD.device, dtype=torch.int32)
        expert_P = torch.searchsorted(plan.offsets_E, row_P, right=True).clamp(max=len(x_EBD) - 1)
        return x_EBD[expert_P, plan.instance_P]


@dataclass(frozen=True)
class Row:
    """One measured configuration; rates in samples/s, ``active`` the mean number of experts per instance."""

    batch_size: int
    num_experts: int
    grouped_per_s: float
    dense_per_s: float
    active: float
    grouped_tflops: float


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 2 where there is no such device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu only shows that it runs")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks/gpu.py: no usable CUDA GPU on this machine, nothing measured", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    own = _own_rates(device)
    print(f"{_name(device)}, torch {torch.__version__}: " + ", ".join(f"{k} {v:,.1f}" for k, v in own.items()))
    rows = []
    print(f"{'batch':>6} {'experts':>7} {'active':>6} {'grouped/s':>12} {'dense/s':>12} {'ratio':>6} {'TFLOP/s':>8}")
    for batch_size in options.batch_sizes:
        blocks = _blocks(batch_size)
        for num_experts in options.experts:
            row = _measure(device, blocks, num_experts, options.steps)
            rows.append(row)
            ratio = row.grouped_per_s / row.dense_per_s
            print(
                f"{row.batch_size:6d} {row.num_experts:7d} {row.active:6.1f} {row.grouped_per_s:12,.0f} "
                f"{row.dense_per_s:12,.0f} {ratio:6.2f} {row.grouped_tflops:8.2f}"
            )
    if options.json:
        figures = {"device": _name(device), **own, "rows": [asdict(row) for row in rows]}
        Path(options.json).write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return 0


def _measure(device: torch.device, blocks: list[ExampleBlock], num_experts: int, steps: int) -> Row:
    large = smes_large()
    config = replace(large, early=EarlyConfig(), experts=replace(large.experts, num=num_experts))
    grouped_per_s, active = _training_rate(device, blocks, config, steps)
    with _dense_experts():
        dense_per_s, _ = _training_rate(device, blocks, config, steps)
    flops = 6 * _multiply_adds(config, active)  # a multiply and an add, forward and twice backward
    return Row(len(blocks[0]), num_experts, grouped_per_s, dense_per_s, active, grouped_per_s * flops / 1e12)


def _multiply_adds(config: SmesConfig, active: float) -> float:
    """Of encoder, trunk and so many full experts, forward for one instance."""
    input_dim = _SCHEMA.id_width * ModelConfig().embedding_dim
    encoded = config.encoder_dims[-1]
    trunk_reads = input_dim if config.trunk_input == "raw" else encoded
    encoder, trunk, expert = (
        sum(a * b for a, b in pairwise(widths))
        for widths in (
            (input_dim, *config.encoder_dims),
            (trunk_reads, *config.trunk_dims),
            (encoded, *config.experts.dims),
        )
    )
    return encoder + trunk + active * expert


@contextmanager
def _dense_experts() -> Iterator[None]:
    """Within it, rankers with full experts are built with :class:`DenseExperts`."""
    grouped = EXPERT_FORMS["full"]
    EXPERT_FORMS["full"] = lambda input_dim, config: DenseExperts(config.num, input_dim, config.dims, config.norm)
    try:
        yield
    finally:
        EXPERT_FORMS["full"] = grouped


def _training_rate(
    device: torch.device, blocks: list[ExampleBlock], config: SmesConfig, steps: int
) -> tuple[float, float]:
    """(samples/s, mean active experts), the next batch prepared while a step runs."""
    learner = Learner(_SCHEMA, ModelConfig(smes=config), OptimizerConfig(), device=device)
    for block in blocks:
        learner.step(learner.prepare(block))
    _synchronise(device)
    start = time.perf_counter()
    batch = learner.prepare(blocks[0])
    for step in range(steps):
        result = learner.step(batch)
        batch = learner.prepare(blocks[(step + 1) % len(blocks)])
    _synchronise(device)
    rate = steps * len(blocks[0]) / (time.perf_counter() - start)
    assert result.active_experts is not None, "SMES has experts"
    return rate, float(result.active_experts.float().mean())


def _own_rates(device: torch.device) -> dict[str, float]:
    """What the device does at best: bf16 GEMM, copies within its memory, pinned copies to it."""
    on_gpu = device.type == "cuda"
    size, copied = (8192, 1 << 30) if on_gpu else (512, 1 << 24)
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    host = torch.zeros(copied // 4, dtype=torch.uint8)
    host = host.pin_memory() if on_gpu else host
    arrived = torch.empty_like(host, device=device)
    return {
        "gemm_bf16_tflops": 2 * size**3 / _seconds(device, lambda: a @ a) / 1e12,
        "copy_gb_per_s": 2 * copied / _seconds(device, lambda: target.copy_(source)) / 1e9,
        "host_to_device_gb_per_s": len(host) / _seconds(device, lambda: arrived.copy_(host, non_blocking=True)) / 1e9,
    }


def _seconds(device: torch.device, work: Callable[[], object], repeats: int = 10) -> float:
    work()
    _synchronise(device)
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    _synchronise(device)
    return (time.perf_counter() - start) / repeats


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _blocks(batch_size: int, count: int = 8) -> list[ExampleBlock]:
    """Batches of 40 id fields with heavy-tailed popularity."""
    rng = np.random.default_rng(0)
    blocks = []
    for _ in range(count):
        ids = rng.zipf(1.5, (batch_size, _SCHEMA.id_width)) % 1000
        ids[:, :2] = rng.zipf(1.2, (batch_size, 2)) % 1_000_000
        labels = (rng.random((batch_size, _SCHEMA.num_tasks)) < 0.1).astype(np.float32)
        blocks.append(replace(ExampleBlock.empty(_SCHEMA, batch_size), ids=ids, labels=labels))
    return blocks


if __name__ == "__main__":
    raise SystemExit(main())
