"""What a poisoned stream does to the version in service, without and with the publish gate.

    python -m benchmarks.poison --json poison.json

The synthetic world is trained on once as it is and once with each poison: labels flipped for 5 % of the stream, in a
row and at random from some moment on; numeric values of 10³⁰ in 5 % of the impressions from then on; a producer that
sends one user's clicks for everyone, for 5 % of the stream. Each without the gate, with it (``hold``: the version in
service stays), and with weights that go back to the last good cut (``go_back``). A cut follows every batch.

The loss of a run is the AUC of its version in service below that of the run without poison and gate, at the same
impression, on the same clean impressions that no version has seen; the figure is the largest loss, over all points and
over the binary tasks with enough positives there (:mod:`benchmarks.poison_runs`). The rows of ``nothing`` say what the
gate alone costs. What is not learned from a stretch is missing afterwards, poisoned or not.
``served_auc_loss_left_out`` is the loss of a run without poison and gate that learns nothing from the stretch, and
``served_auc_loss_of_age`` what a version loses if nothing takes its place for as long as one stretch lasts.
``--bursts`` divides the stretch.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.figures import save, show
from benchmarks.poison_runs import GATES, LEFT_OUT, POISONS, CleanLog, Gate, Served, Setting, run
from simulators.synthetic import synthesize
from simulators.world import TASK_NAMES
from smes.arrays import F64

Runs = Mapping[tuple[str, Gate], Served]


def losses(unpoisoned: Served, served: Served) -> F64:
    """AUC below that of the run without poison and gate, float64 [P, T]; NaN where a task does not count.

    Raises:
        ValueError: The runs were not looked at at the same points.
    """
    if unpoisoned.at != served.at:
        raise ValueError(f"{len(served.at)} points, expected the {len(unpoisoned.at)} of the run without poison")
    loss: F64 = unpoisoned.auc - served.auc
    return loss


def figures(runs: Runs) -> dict[str, float]:
    """The largest losses, and what the gate did: ``served_auc_loss`` with weights that go back, over all poisons."""
    unpoisoned = runs["nothing", "none"]
    found = {"served_auc_loss_of_age": float(np.nanmax(_of_age(unpoisoned)))}
    largest: dict[Gate, list[float]] = {gate: [] for gate in GATES}
    for (poison, gate), served in runs.items():
        if (poison, gate) == ("nothing", "none"):
            continue
        loss, key = float(np.nanmax(losses(unpoisoned, served))), f"{_key(poison)}_{gate}"
        if poison == LEFT_OUT:
            found["served_auc_loss_left_out"] = loss
            continue
        found[f"served_auc_loss_{key}"] = loss
        found[f"steps_behind_{key}"] = float(max(served.behind))
        for name in ("published", "refused", "went_back"):
            found[f"{name}_{key}"] = float(served.facts[name])
        if poison != "nothing":
            largest[gate].append(loss)
    totals: tuple[tuple[str, Gate], ...] = (("", "go_back"), ("_hold", "hold"), ("_without_gate", "none"))
    return {f"served_auc_loss{name}": max(largest[gate]) for name, gate in totals if largest[gate]} | found


def table(runs: Runs) -> str:
    """In Markdown: for each poison and gate the largest loss, its task and place, and what became of the cuts."""
    lines = [
        "| poison | gate | largest loss | task | after impressions | at the end | cuts refused | went back | reasons |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (poison, gate), served in runs.items():
        if (poison, gate) == ("nothing", "none"):
            continue
        loss = losses(runs["nothing", "none"], served)
        point, task = np.unravel_index(np.nanargmax(loss), loss.shape)
        facts = served.facts
        refused = f"{facts['refused']:,} of {facts['refused'] + facts['published']:,}"
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(facts["reasons"].items()))
        lines.append(
            f"| {poison} | {gate} | {loss[point, task]:.4f} | {TASK_NAMES[task]} | {served.at[point]:,} | "
            f"{np.nanmax(loss[-1]):.4f} | {refused} | {facts['went_back']} | {reasons} |"
        )
    return "\n".join(lines)


def _of_age(unpoisoned: Served) -> F64:
    """What a version loses by age alone, from the poison's beginning to the end of a stretch. float64 [P, T]."""
    loss: F64 = unpoisoned.auc - unpoisoned.old_auc
    return loss


def _key(poison: str) -> str:
    return poison.replace("'", "").replace(" ", "_")


def measure(setting: Setting, poisons: Sequence[str], gates: Sequence[Gate]) -> Runs:
    """The runs without poison, and all of these poisons behind all of these gates; each says when it is done.

    Args:
        setting: Of all runs.
        poisons: Of :data:`benchmarks.poison_runs.POISONS`.
        gates: Of :data:`benchmarks.poison_runs.GATES`.
    """
    clean, runs = CleanLog(setting), {}
    asked: list[tuple[str, Gate]] = [("nothing", "none"), (LEFT_OUT, "none")]
    asked += [(poison, gate) for poison in poisons for gate in gates]
    for poison, gate in dict.fromkeys(asked):
        runs[poison, gate] = served = run(setting, clean, poison, gate)
        print(f"{poison}, gate {gate}: {served.facts['seconds']:,.0f} s", flush=True)
    return runs


def main() -> None:
    """Parse the command line, run, print the table and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--impressions", type=int, default=400_000, help="of the log")
    parser.add_argument("--begin", type=float, default=0.5, help="share of the log before the poison begins")
    parser.add_argument("--bursts", type=int, default=1, help="in how many stretches a poison in a row comes")
    parser.add_argument("--seed", type=int, default=0, help="of the world and of the first weights")
    parser.add_argument("--poisons", nargs="+", choices=POISONS, default=list(POISONS))
    parser.add_argument("--gates", nargs="+", choices=GATES, default=list(GATES))
    parser.add_argument("--no-sift", action="store_true", help="set trainer.gate.sift to false")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "world.parquet"
        synthesize(log, options.impressions, options.seed)
        setting = Setting(
            log,
            options.impressions,
            options.begin,
            bursts=options.bursts,
            seed=options.seed,
            sift=not options.no_sift,
        )
        runs = measure(setting, options.poisons, options.gates)
    print(table(runs))
    found = figures(runs)
    show(found)
    save(found, options.json)


if __name__ == "__main__":
    main()
