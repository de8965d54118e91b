"""Training and scoring speed of SMES beside other libraries and beside its own dense execution, in one run.

    python -m benchmarks.speed --json speed.json --plot docs/images/speed.png
    python -m benchmarks.speed --quick      # has anything become much slower? see quick.py
    python -m benchmarks.speed --preset paper --smes experts.dims=[128,64]      # the paper's form as the contender

33 id fields × 16, 8 tasks, batches of 1,024, scoring calls of 500 candidates, 2 threads, all embeddings trained. Rounds
are interleaved: every round times every contender, each round beginning with another one, and a ratio is the median of
the rounds' own ratios. Figures come as median with the least and greatest round beside it (`_min`, `_max`).

Contenders: `smes16`, `smes64`, `smes256` (SMES by `--preset` at that many experts; `--smes` overrides its other
settings), `wide64` (the same with full experts of two layers, as the peers have them), `paper64` (the paper's form,
likewise), `dense…` (the same SMES, all experts executed on every instance), `mmoe…` (our own MMoE, experts as the peers
have them), and the peers `rechub_mmoe8`, `rechub_mmoe64`, `rechub_ple9`, `deepctr_mmoe8`. What a step and a scoring
call include is said in speed_ours.py and speed_peers.py; in short, ours include looking ids up and theirs do not.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
import yaml

from benchmarks import quick, speed_requests
from benchmarks.speed_ours import our_contender
from benchmarks.speed_peers import PEER_MODULES, deepctr_mmoe, missing_peers, rechub_mmoe, rechub_ple
from benchmarks.speed_report import draw, table
from benchmarks.speed_setting import Contender, Data, Setting, make_data
from benchmarks.step_breakdown import breakdown, count_flop, gemm_flop_per_s
from smes.model.config import ModelConfig, Preset, model_preset
from smes.model.devices import keep_freed_memory
from smes.rankers.config import MmoeConfig
from smes.rankers.sparse.config import SmesConfig, smes_paper

NUM_EXPERTS = (16, 64, 256)
PEERS = ("rechub_mmoe8", "rechub_mmoe64", "rechub_ple9", "deepctr_mmoe8")
GROWING = tuple(f"{kind}{E}" for kind in ("smes", "dense") for E in NUM_EXPERTS)
OURS = (*GROWING, "wide64", "dense_wide64", "paper64", "dense_paper64", "mmoe8", "mmoe64")
MAX_SECONDS = 5.0  # of one contender's training in one round
SCORING_CALLS = 20

RATIOS = {
    # name: (figure, above, below); how many times faster SMES trains, and what it costs beside the other
    "train_vs_rechub_mmoe8": ("train_per_s", "wide64", "rechub_mmoe8"),
    "train_vs_rechub_mmoe64": ("train_per_s", "wide64", "rechub_mmoe64"),
    "train_vs_rechub_ple9": ("train_per_s", "wide64", "rechub_ple9"),
    "train_vs_deepctr_mmoe8": ("train_per_s", "wide64", "deepctr_mmoe8"),
    "train_vs_dense": ("train_per_s", "wide64", "dense_wide64"),
    "latency_vs_dense": ("latency_ms", "wide64", "dense_wide64"),
    "latency_vs_mmoe64": ("latency_ms", "wide64", "mmoe64"),
    "latency_vs_rechub_mmoe64": ("latency_ms", "wide64", "rechub_mmoe64"),
    "paper_train_vs_rechub_mmoe8": ("train_per_s", "paper64", "rechub_mmoe8"),
    "paper_train_vs_rechub_mmoe64": ("train_per_s", "paper64", "rechub_mmoe64"),
    "paper_train_vs_dense": ("train_per_s", "paper64", "dense_paper64"),
    "paper_latency_vs_dense": ("latency_ms", "paper64", "dense_paper64"),
    # The preset with 256 experts, whatever number it has by itself.
    "default_train_vs_rechub_mmoe8": ("train_per_s", "smes256", "rechub_mmoe8"),
    "default_train_vs_dense": ("train_per_s", "smes256", "dense256"),
    "default_latency_vs_dense": ("latency_ms", "smes256", "dense256"),
    "step_e256_vs_e16": ("step_ms", "smes256", "smes16"),
    "step_e64_vs_e16": ("step_ms", "smes64", "smes16"),
    "dense_step_e256_vs_e16": ("step_ms", "dense256", "dense16"),
}


@dataclass(frozen=True)
class Effort:
    """Attributes: repeats, timed rounds, ≥ 5 for a figure to quote; steps, training steps of a contender in each."""

    repeats: int = 7
    steps: int = 20


def build(names: Sequence[str], smes: SmesConfig, setting: Setting, data: Data) -> list[Contender]:
    """The contenders by these names."""
    base = ModelConfig(embedding_dim=setting.embedding_dim, smes=smes)

    def ours(name: str, what: str, config: ModelConfig, *, dense: bool = False) -> Callable[[], Contender]:
        return lambda: our_contender(name, what, config, setting, data, dense=dense)

    def smes_of(shape: SmesConfig, num_experts: int, **experts: Any) -> ModelConfig:
        return replace(base, smes=replace(shape, experts=replace(shape.experts, num=num_experts, **experts)))

    def mmoe(num_experts: int) -> ModelConfig:
        # Without an encoder, as the peers' experts read the embeddings themselves.
        return replace(base, ranker="mmoe", mmoe=MmoeConfig(num_experts, (), setting.expert_dims))

    paper = smes_of(smes_paper(), 64, dims=setting.expert_dims)
    trunk_dims = (*smes.trunk_dims[:-1], setting.expert_dims[-1]) if smes.trunk_dims else ()
    wide = smes_of(replace(smes, trunk_dims=trunk_dims), 64, dims=setting.expert_dims, form="full")
    builders: dict[str, Callable[[], Contender]] = {
        "wide64": ours("wide64", "SMES, 64 experts as the peers'", wide),
        "dense_wide64": ours("dense_wide64", "SMES executed densely, 64 experts as the peers'", wide, dense=True),
        "paper64": ours("paper64", "SMES, the paper's form, 64 experts", paper),
        "dense_paper64": ours("dense_paper64", "the paper's form executed densely, 64 experts", paper, dense=True),
        "mmoe8": ours("mmoe8", "our MMoE, 8 experts", mmoe(8)),
        "mmoe64": ours("mmoe64", "our MMoE, 64 experts", mmoe(64)),
        "rechub_mmoe8": lambda: rechub_mmoe(8, setting, data),
        "rechub_mmoe64": lambda: rechub_mmoe(64, setting, data),
        "rechub_ple9": lambda: rechub_ple(setting, data),
        "deepctr_mmoe8": lambda: deepctr_mmoe(8, setting, data),
    }
    for E in NUM_EXPERTS:
        config = smes_of(smes, E)
        builders[f"smes{E}"] = ours(f"smes{E}", f"SMES, {E} experts", config)
        builders[f"dense{E}"] = ours(f"dense{E}", f"SMES executed densely, {E} experts", config, dense=True)
    return [builders[name]() for name in names]


def run(contenders: Sequence[Contender], setting: Setting, effort: Effort) -> dict[str, float]:
    """All figures, flat."""
    rounds: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        rounds.setdefault(name, []).append(value)

    figures: dict[str, float] = {}
    for contender in contenders:  # warms up, too
        flop = count_flop(partial(contender.train, 0))
        figures[f"{contender.name}_step_gflop"] = flop / 1e9
        figures[f"{contender.name}_parameters"] = float(contender.parameters)
        _step_seconds(contender, 3)
        _score_seconds(contender, 3)
    for turn in range(effort.repeats):
        note("gemm_gflop_per_s", gemm_flop_per_s() / 1e9)
        first = turn * 5 % len(contenders)
        for contender in [*contenders[first:], *contenders[:first]]:
            name = contender.name
            gc.collect()
            step_s = _step_seconds(contender, effort.steps)
            note(f"{name}_step_ms", step_s * 1e3)
            note(f"{name}_train_per_s", setting.batch_size / step_s)
            note(f"{name}_gflop_per_s", figures[f"{name}_step_gflop"] / step_s)
            note(f"{name}_latency_ms", _score_seconds(contender, SCORING_CALLS) * 1e3)
            if name.startswith(("smes", "wide", "paper")):
                for part, seconds in breakdown(contender.train, effort.steps).items():
                    note(f"{name}_{part}_ms", seconds * 1e3)
    for name in [c.name for c in contenders]:
        shares = zip(rounds[f"{name}_gflop_per_s"], rounds["gemm_gflop_per_s"], strict=True)
        rounds[f"{name}_share_of_gemm"] = [own / machine for own, machine in shares]
    if "smes64_share_of_gemm" in rounds:
        rounds["step_gemm_share"] = rounds["smes64_share_of_gemm"]
    rounds.update(ratios_of_rounds(rounds))
    return figures | _summary(rounds)


def ratios_of_rounds(rounds: dict[str, list[float]]) -> dict[str, list[float]]:
    """The ratios of each round by itself, of the contenders that took part."""
    ratios = {}
    for ratio, (figure, above, below) in RATIOS.items():
        pair = rounds.get(f"{above}_{figure}"), rounds.get(f"{below}_{figure}")
        if pair[0] and pair[1]:
            ratios[ratio] = [a / b for a, b in zip(pair[0], pair[1], strict=True)]
    return ratios


def _summary(rounds: dict[str, list[float]]) -> dict[str, float]:
    summary = {}
    for name, values in rounds.items():
        summary[name] = statistics.median(values)
        summary[f"{name}_min"], summary[f"{name}_max"] = min(values), max(values)
    return summary


def _step_seconds(contender: Contender, steps: int) -> float:
    """Mean of ``steps`` steps, or of those begun within :data:`MAX_SECONDS`."""
    start = time.perf_counter()
    for n in range(steps):
        contender.train(n)
        if (seconds := time.perf_counter() - start) > MAX_SECONDS:
            break
    return seconds / (n + 1)


def _score_seconds(contender: Contender, calls: int) -> float:
    """Median of single calls."""
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        contender.score()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def smes_config(overrides: Sequence[str], preset: Preset = "default") -> SmesConfig:
    """A preset's SMES configuration with ``KEY=VALUE`` overrides, keys dotted, values as in YAML.

    Raises:
        ValueError: An override without ``=``, an unknown key, or a value that the configuration refuses.
    """
    model = model_preset(preset).to_dict()
    for override in overrides:
        key, equals, text = override.partition("=")
        *parents, name = key.split(".")
        section = model["smes"]
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if not equals or not isinstance(section, dict):
            raise ValueError(f"--smes {override}: expected KEY=VALUE with a key such as experts.num")
        section[name] = yaml.safe_load(text)
    return ModelConfig.from_dict(model).smes


def main(arguments: list[str] | None = None, *, peers: Mapping[str, str] = PEER_MODULES) -> int:
    """Exit status: 0, or 2 if a peer is not installed or an option is wrong. ``peers``: module → package."""
    options = _parser().parse_args(arguments)
    if options.quick:
        return quick.main(store=options.store)
    if (missing := missing_peers(peers)) and set(options.contenders) & set(PEERS):
        print(f"benchmarks/speed.py: {', '.join(missing)} not installed; `make bench` installs what is compared with,\n"
              "or: pip install --no-deps -r requirements-bench.lock. "
              "To measure without: --contenders smes64 dense64 …", file=sys.stderr)  # fmt: skip
        return 2
    try:
        smes = smes_config(options.smes, options.preset)
    except ValueError as error:
        print(f"benchmarks/speed.py: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as our processes do: it serves all contenders
    setting = Setting(vocabulary=options.vocabulary)
    contenders = build(options.contenders, smes, setting, make_data(setting))
    figures = run(contenders, setting, Effort(options.repeats, options.steps))
    ratios = list(RATIOS)
    if options.contenders == [*OURS, *PEERS]:
        requests = speed_requests.measure(setting, smes, options.repeats)
        figures |= _summary(requests)
        ratios += [name for name in requests if name.endswith("_speedup")]
    settings = {"threads": options.threads, "repeats": options.repeats, "steps": options.steps}
    print(f"torch {torch.__version__}, {settings}, {setting}\n{smes}\n")
    print(table(contenders, figures, ratios))
    if options.json:
        options.json.write_text(json.dumps({**settings, **figures}, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        draw(contenders, figures, options.plot)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=Effort.repeats, help="timed rounds, at least 5 to quote")
    parser.add_argument("--steps", type=int, default=Effort.steps, help="training steps of a contender in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=Setting.vocabulary, help="ids per field")
    parser.add_argument("--preset", choices=get_args(Preset), default="default", help="the configuration of SMES")
    parser.add_argument("--smes", action="append", default=[], metavar="KEY=VALUE", help="override of a key of it")
    everyone = [*OURS, *PEERS]
    parser.add_argument("--contenders", nargs="+", choices=everyone, default=everyone, metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="a few ratios against the stored ones, in a minute")
    parser.add_argument("--store", action="store_true", help="with --quick: store them")
    parser.add_argument("--json", type=Path, help="write the figures to this file, one flat object")
    parser.add_argument("--plot", type=Path, help="draw them into this PNG")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
