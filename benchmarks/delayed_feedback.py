"""``python -m benchmarks.delayed_feedback``: calibration when feedback comes late, against the truth of a world.

A stationary world of eight tasks (``benchmarks/worlds.py``, ``segments``) is shown over days of event time. Every
positive comes after a lognormal delay of some minutes, hours or a day, within an attribution window of two days. Each
impression is scored when it is shown, by the weights of that moment, as in service; then what has come by then is
joined and trained on, by one of these policies:

- oracle: all labels at once, as nobody has them;
- window: wait for the attribution window;
- naive: train at once, later positives are further examples, nothing is corrected;
- fnw, es_dfm: the same with the weights of :mod:`smes.model.delayed_feedback`; es_dfm also after a wait.

Scores after warm-up are compared with the true probabilities: ECE over 20 bins of equal mass, with the true probability
in the place of the label, so that labels add no noise; NE with the expected log loss. Means over tasks and seeds.

The keys of ``--json``: ``{figure}_{policy}_{delays}``, ``ece_ratio_{policy}_{delays}`` against the oracle's, and
``ece_ratio_vs_oracle``, ``naive_ece_ratio_vs_oracle``: means over the delays, of es_dfm without a wait and of naive.

Letters: N impressions, T tasks, M feedback events.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.figures import save
from benchmarks.worlds import NUM_TASKS, WORLDS, World
from smes.arrays import F32, F64, I64
from smes.events import ExampleBlock, FeedbackBlock, ImpressionBlock
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.devices import keep_freed_memory
from smes.model.frozen_model import FrozenModel
from smes.model.learner import Learner
from stream.config import JoinConfig, MiniBatchConfig
from stream.join.waits import Correction, Wait
from stream.mini_batches import Assembler

DAY_S = 86_400.0
WINDOW_S, SPAN_S, WARM_UP_S = 2 * DAY_S, 8 * DAY_S, 5 * DAY_S
DELAYS_S = {"minutes": 300.0, "hours": 3 * 3600.0, "days": DAY_S}
"""Median delay of a positive; the deviation of its logarithm is 1."""

BATCH = 512
_BINS = 20


@dataclass(frozen=True)
class Policy:
    """When the model learns, and how the loss makes up for what comes later; no wait: the oracle."""

    wait: Wait | None
    correction: Correction = "none"


POLICIES = {
    "oracle": Policy(None),
    "window": Policy("window"),
    "naive": Policy("immediate", "none"),
    "fnw": Policy("immediate", "fnw"),
    "es_dfm": Policy("immediate", "es_dfm"),
    "es_dfm_after_15_minutes": Policy(900.0, "es_dfm"),
}


@dataclass(frozen=True)
class Shown:
    """Everything that happens in one world.

    Attributes:
        world: The world.
        examples: N impressions in the order of time, with their final labels.
        truth_NT: Their true probabilities.
        feedback: M events in the order of time.
    """

    world: World
    examples: ExampleBlock
    truth_NT: F64
    feedback: FeedbackBlock


def show(impressions: int, seed: int, median_s: float) -> Shown:
    """Make a world's impressions, evenly spaced, and their feedback."""
    world = World(WORLDS["segments"], seed)
    world.schema = replace(world.schema, tasks=tuple(replace(task, window_s=WINDOW_S) for task in world.schema.tasks))
    blocks, truths = zip(*world.stream(impressions, BATCH), strict=True)
    examples = ExampleBlock.concat(blocks)
    examples.event_time_ms[:] = (np.arange(impressions) * (SPAN_S * 1000 / impressions)).astype(np.int64)
    rows, tasks = np.nonzero(examples.labels)
    rng = np.random.default_rng([seed, 7])
    delay_s = np.minimum(median_s * np.exp(rng.normal(size=len(rows))), WINDOW_S - 1)
    feedback = FeedbackBlock.empty(len(rows))
    feedback.impression_id[:] = examples.impression_id[rows]
    feedback.task[:] = tasks
    feedback.value[:] = 1
    feedback.event_time_ms[:] = examples.event_time_ms[rows] + np.ceil(1000 * delay_s).astype(np.int64)
    return Shown(world, examples, np.concatenate(truths), feedback.take(np.argsort(feedback.event_time_ms)))


def scores(shown: Shown, policy: Policy, seed: int) -> F32:
    """The score of each impression by the weights of the moment at which it was shown. float32 [N, T]."""
    schema, cpu = shown.world.schema, torch.device("cpu")
    learner = Learner(schema, ModelConfig(), OptimizerConfig(), device=cpu, seed=seed)
    scored = []
    for examples, batches in moments(shown, policy):
        frozen = FrozenModel.freeze(learner, cpu)
        scored.append(frozen.score(examples.ids, examples.numerics))
        frozen.close()
        for batch in batches:
            to_train_on, closings = batch.to_train_on(), batch.closings()
            if len(to_train_on):
                learner.step(learner.prepare(to_train_on))
            if len(closings):
                learner.observe_closed(closings)
    return np.concatenate(scored)


def moments(shown: Shown, policy: Policy) -> Iterator[tuple[ExampleBlock, list[ExampleBlock]]]:
    """What is shown next, and the batches to train on after that."""
    wait = policy.wait or "window"
    join = JoinConfig(allowed_lateness_s=0.0, vouchers=1, wait={"default": wait}, correction=policy.correction)
    assembler = Assembler(shown.world.schema, join, MiniBatchConfig(size=BATCH, max_wait_s=None), partitions=1)
    columns = [name for name in ImpressionBlock.__dataclass_fields__ if name in ExampleBlock.__dataclass_fields__]
    start = 0
    for first in range(0, len(shown.examples), BATCH):
        examples = shown.examples.take(slice(first, first + BATCH))
        if policy.wait is None:
            yield examples, [examples]
            continue
        impressions = replace(
            ImpressionBlock.empty(shown.world.schema, len(examples)),
            **{name: getattr(examples, name) for name in columns},
        )
        now_ms = examples.event_time_ms[-1]
        stop = int(np.searchsorted(shown.feedback.event_time_ms, now_ms, side="right"))
        assembler.push(impressions, shown.feedback.take(slice(start, stop)))
        start = stop
        yield examples, list(iter(assembler.next_batch, None))


def calibration_error(score_N: F32, truth_N: F64) -> float:
    """ECE over bins of equal mass: the mean distance of mean score and mean true probability."""
    order = np.argsort(score_N, kind="stable")
    bins = np.array_split(order, _BINS)
    return sum(len(b) * abs(float(score_N[b].mean(dtype=np.float64) - truth_N[b].mean())) for b in bins) / len(order)


def normalised_entropy(score_N: F32, truth_N: F64) -> float:
    """Expected log loss divided by the entropy of the mean probability."""
    q = np.clip(score_N.astype(np.float64), 1e-7, 1 - 1e-7)
    rate = truth_N.mean()
    loss = -(truth_N * np.log(q) + (1 - truth_N) * np.log1p(-q)).mean()
    return float(loss / -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)))


def figures(shown: Shown, score_NT: F32) -> dict[str, F64]:
    """ECE, NE, and mean score over mean probability of each task after warm-up. float64 [T] each."""
    rows: I64 = np.flatnonzero(shown.examples.event_time_ms >= WARM_UP_S * 1000)
    score_NT, truth_NT = score_NT[rows], shown.truth_NT[rows]
    of_tasks = [(score_NT[:, t], truth_NT[:, t]) for t in range(NUM_TASKS)]
    return {
        "ece": np.array([calibration_error(*task) for task in of_tasks]),
        "ne": np.array([normalised_entropy(*task) for task in of_tasks]),
        "calibration": score_NT.mean(axis=0, dtype=np.float64) / truth_NT.mean(axis=0),
    }


def measure(impressions: int, seeds: int, delays: list[str], policies: list[str]) -> dict[str, float]:
    """The flat object that ``--json`` writes; prints a line for each run."""
    result: dict[str, float] = {"impressions": impressions, "seeds": seeds}
    for name in delays:
        of_policy: dict[str, list[dict[str, F64]]] = {policy: [] for policy in policies}
        for seed in range(seeds):
            shown = show(impressions, seed, DELAYS_S[name])
            for policy in policies:
                started_s = time.perf_counter()
                got = figures(shown, scores(shown, POLICIES[policy], seed))
                of_policy[policy].append(got)
                means = "  ".join(f"{figure} {values.mean():.4f}" for figure, values in got.items())
                print(
                    f"{name:8} seed {seed}  {policy:24} {means}  ({time.perf_counter() - started_s:.0f} s)", flush=True
                )
        for policy, runs in of_policy.items():
            for figure in ("ece", "ne", "calibration"):
                result[f"{figure}_{policy}_{name}"] = float(np.mean([run[figure] for run in runs]))
            result[f"ece_ratio_{policy}_{name}"] = result[f"ece_{policy}_{name}"] / result[f"ece_oracle_{name}"]
    for key, policy in (("ece_ratio_vs_oracle", "es_dfm"), ("naive_ece_ratio_vs_oracle", "naive")):
        if policy in policies:
            result[key] = float(np.mean([result[f"ece_ratio_{policy}_{name}"] for name in delays]))
    return result


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.delayed_feedback", description=__doc__.split("\n")[0])
    parser.add_argument("--impressions", type=int, default=262_144, help="shown in each run, a multiple of 16,384")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--delays", nargs="+", choices=DELAYS_S, default=list(DELAYS_S))
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES), help="oracle is always run")
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    policies = ["oracle", *(policy for policy in arguments.policies if policy != "oracle")]
    result = measure(arguments.impressions, arguments.seeds, arguments.delays, policies)
    print(f"\n{'delays':8} {'policy':24} {'ECE':>7} {'/ oracle':>8} {'NE':>7} {'score / truth':>13}")
    for name in arguments.delays:
        for policy in policies:
            ece, ratio, ne, mean = (
                result[f"{figure}_{policy}_{name}"] for figure in ("ece", "ece_ratio", "ne", "calibration")
            )
            print(f"{name:8} {policy:24} {ece:7.4f} {ratio:8.2f} {ne:7.4f} {mean:13.3f}")
    save(result, arguments.json)


if __name__ == "__main__":
    main()
