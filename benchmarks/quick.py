"""A few ratios in less than a minute: has something become much slower?

    python -m benchmarks.speed --quick           # exit status 1 if a ratio has fallen by more than a quarter
    python -m benchmarks.speed --quick --store   # on an idle machine: what the ratios are from now on

The ratios are in quick.json, with the processor that they were measured on; on another one they are printed and not
compared. What ours is measured by never changes: an MMoE of plain torch operators in this module, the step of fewer
experts, the steps of a backtest. All run on one thread, by turns of some milliseconds, and count their own processor
time. A ratio is the median of the rounds'. One that has fallen is measured a second time before it counts.
"""

import gc
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.pipeline import given_batches, train
from benchmarks.speed_ours import our_contender
from benchmarks.speed_setting import Contender, Data, Setting, make_data
from simulators.synthetic import synthesize
from smes.model.config import ModelConfig
from smes_cli.backtest import run_backtest
from smes_cli.building import warm_up
from smes_cli.config import Config
from smes_cli.console import console

STORED = Path(__file__).with_name("quick.json")
FALLEN = 0.75
"""Part of a stored ratio below which it has fallen."""
_ROUNDS = 9
_IMPRESSIONS = 4_096


@dataclass(frozen=True)
class Pair:
    """Two things to do; the ratio is how many times as long the reference takes.

    Attributes:
        reference: Nothing of it should change, or less than of ours.
        ours: What might become slower.
        reference_times, times: How often each is done in a round.
    """

    reference: Callable[[], object]
    ours: Callable[[], object]
    reference_times: int = 1
    times: int = 1


def measured(pairs: Mapping[str, Pair]) -> dict[str, float]:
    """The ratio of each pair."""
    for pair in pairs.values():
        pair.reference()
        pair.ours()
    rounds: dict[str, list[float]] = {name: [] for name in pairs}
    gc.collect()
    for _ in range(_ROUNDS):
        for name, pair in pairs.items():
            reference_s = _processor_s(pair.reference, pair.reference_times)
            rounds[name].append(reference_s / _processor_s(pair.ours, pair.times))
    return {name: statistics.median(values) for name, values in rounds.items()}


def fallen(ratios: Mapping[str, float], stored: Mapping[str, float]) -> list[str]:
    """The names of the ratios that have fallen, or that nothing is stored of."""
    return [name for name, ratio in ratios.items() if name not in stored or ratio < FALLEN * stored[name]]


def check(pairs: Mapping[str, Pair], stored: Mapping[str, float]) -> int:
    """Print each ratio beside the stored one; exit status 1 if one has fallen twice."""
    ratios = measured(pairs)
    if again := fallen(ratios, stored):
        ratios |= measured({name: pairs[name] for name in again})
    bad = fallen(ratios, stored)
    for name, ratio in ratios.items():
        print(f"{name:22} {ratio:8.3f}  stored {stored.get(name, float('nan')):8.3f}")
    for name in bad:
        if name in stored:
            print(
                f"{name}: {ratio_text(ratios[name], stored[name])}, expected at least {FALLEN:g} of it in two "
                "measurements. Look for what became slower; if it is worth it, store the new ratios with "
                "`python -m benchmarks.speed --quick --store` on an idle machine",
                file=sys.stderr,
            )
        else:
            print(f"{name}: not in {STORED.name}, expected a stored ratio (--quick --store)", file=sys.stderr)
    return 1 if bad else 0


def ratio_text(ratio: float, stored: float) -> str:
    """A ratio as a part of the stored one, in words."""
    return f"{ratio:.3f} is {ratio / stored:.2f} of the stored {stored:.3f}"


def main(*, store: bool) -> int:
    """Measure, and compare or store. Exit status."""
    console.quiet = True
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        pairs = all_pairs(Path(folder) / "world.parquet")
        if store:
            ratios = {name: round(ratio, 3) for name, ratio in measured(pairs).items()}
            STORED.write_text(json.dumps({"processor": processor(), "ratios": ratios}, indent=1) + "\n", "utf-8")
            print(f"stored in {STORED}: {ratios}")
            return 0
        stored = json.loads(STORED.read_text("utf-8"))
        if stored["processor"] != processor():
            print(f"not compared: {STORED.name} is of {stored['processor']}, this is {processor()}")
            print(json.dumps(measured(pairs), indent=1))
            return 0
        return check(pairs, stored["ratios"])


def all_pairs(log: Path) -> dict[str, Pair]:
    """What is measured. ``log`` is made."""
    setting = Setting()
    data = make_data(setting)
    plain = PlainMmoe(setting, data)
    default = ModelConfig(embedding_dim=setting.embedding_dim)
    few, usual, many = (_smes(default, experts, setting, data) for experts in (16, 64, 256))
    return {
        "train_vs_plain": Pair(plain.train_step, _steps(usual), 1, 3),
        "latency_vs_plain": Pair(plain.score, usual.score, 5, 5),
        "step_e16_vs_e256": Pair(_steps(few), _steps(many), 3, 3),
        "backtest_share": _backtest(log),
    }


class PlainMmoe(nn.Module):
    """MMoE with eight experts by torch's own operators: nothing of ours is in it.

    Args:
        setting: Sizes.
        data: What is trained and scored; ids are row numbers.
    """

    def __init__(self, setting: Setting, data: Data, num_experts: int = 8) -> None:
        super().__init__()
        torch.manual_seed(setting.seed)
        width = setting.num_fields * setting.embedding_dim
        self.table = nn.Embedding(setting.num_fields * setting.vocabulary, setting.embedding_dim)
        wide, narrow = setting.expert_dims
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, wide), nn.ReLU(), nn.Linear(wide, narrow), nn.ReLU())
            for _ in range(num_experts)
        )
        self.gates = nn.Linear(width, setting.num_tasks * num_experts)
        self.towers = nn.Parameter(torch.randn(setting.num_tasks, narrow) / narrow**0.5)
        first_F = torch.arange(setting.num_fields) * setting.vocabulary
        self._ids = [torch.from_numpy(batch.ids) + first_F for batch in data.batches]
        self._labels = [torch.from_numpy(batch.labels) for batch in data.batches]
        self._candidates = torch.from_numpy(data.candidates) + first_F
        self._optimizer = torch.optim.Adam(self.parameters(), lr=setting.peer_learning_rate, fused=True)
        self._step = 0

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [B, fields] → logits [B, T]."""
        x_BI = self.table(ids).flatten(1)
        y_BEH = torch.stack([expert(x_BI) for expert in self.experts], dim=1)
        gates_BTE = self.gates(x_BI).view(len(ids), len(self.towers), -1).softmax(dim=2)
        logits_BT: Tensor = ((gates_BTE @ y_BEH) * self.towers).sum(dim=2)
        return logits_BT

    def train_step(self) -> None:
        """Take a step on the next batch."""
        n = self._step % len(self._ids)
        self._step += 1
        self._optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(self(self._ids[n]), self._labels[n], reduction="sum")
        loss.backward()  # type: ignore[no-untyped-call]  # torch ships no type for it
        self._optimizer.step()

    def score(self) -> Tensor:
        """Score the candidates once."""
        with torch.inference_mode():
            scores: Tensor = self(self._candidates).sigmoid()
        return scores


def processor() -> str:
    """The processor's name, family and model (Linux), else its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    first = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    if "model name" not in first:
        return platform.machine()
    return f"{first['model name']}, family {first.get('cpu family', '?')}, model {first.get('model', '?')}"


def _smes(default: ModelConfig, experts: int, setting: Setting, data: Data) -> Contender:
    config = replace(default, smes=replace(default.smes, experts=replace(default.smes.experts, num=experts)))
    return our_contender(f"smes{experts}", f"SMES, {experts} experts", config, setting, data)


def _steps(contender: Contender) -> Callable[[], object]:
    numbers = iter(range(sys.maxsize))
    return lambda: contender.train(next(numbers))


def _backtest(log: Path) -> Pair:
    """The steps of a backtest alone, and all of it."""
    config = Config()
    synthesize(log, _IMPRESSIONS, seed=0)
    schema, batches = given_batches(config, log, None)
    warm_up(config, schema)
    return Pair(
        lambda: train(config, schema, batches, evaluate=False),
        lambda: run_backtest(config, log, limit=None, seed=0, baseline=None, should_stop=lambda: False),
    )


def _processor_s(call: Callable[[], object], times: int) -> float:
    start_s = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - start_s) / times
