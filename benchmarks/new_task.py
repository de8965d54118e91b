"""A task is added to a running model: what it learns after the change, against other ways to bring it in.

    python -m benchmarks.new_task --json new_task.json
    python -m benchmarks.new_task --seeds 2 --worlds alike --before 65536 --after 65536   # another size

Three tasks of a world with rare tasks (:mod:`benchmarks.rare_worlds`, here with base rates of 45 to 5 %) follow the
user's segment. After ``--before`` instances comes a fourth. In the world ``alike`` it follows the segment, too, and
agrees by half with the others in each; in ``other`` it follows the item's category, of which the others say nothing.

- ``from_start``: trained with the four tasks from the first instance on.
- ``carried``: the state is carried over (:mod:`smes.model.carry_over`), with a probe that may end with own experts.
- ``probe_only``: likewise, but the probe never ends; ``own_at_once``: own experts from the change on.
- ``anew``: everything is forgotten at the change, as without a carry-over.
- ``without``: the new task never comes, to see what it does to the others.

AUC per part of the stream after the change, scored before it is trained on: of the new task, and the mean of the
others. ``own_experts_at``: instances after the change at which the probe gave own experts, 0 if it did not.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.figures import save, show
from benchmarks.rare_worlds import RareWorld
from benchmarks.worlds import WorldSpec
from smes.arrays import F32
from smes.events import ExampleBlock
from smes.model.carry_over import carry_over
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.learner import Learner
from smes.schema import Schema
from smes.schema_change import SchemaChange

SPEC = WorldSpec(segments=32, categories=32, by_category=(1, 3, 5, 7), least_rate=0.05)
TASKS = (0, 4, 6)
WORLDS = {"alike": 2, "other": 3}
"""The task that comes."""
WAYS = ("from_start", "carried", "probe_only", "own_at_once", "anew", "without")
FIRST_PART = 16_384
_CPU = torch.device("cpu")


def run(world: str, way: str, seed: int, before: int, after: int, batch_size: int) -> dict[str, float]:
    """One way through one world.

    Args:
        world: Of :data:`WORLDS`.
        way: Of :data:`WAYS`.
        seed: Of the world and of the first weights.
        before, after: Instances before and after the change.
        batch_size: Of a step.
    """
    stream = RareWorld(SPEC, seed)
    was, now = (replace(stream.schema, tasks=tuple(stream.schema.tasks[t] for t in tasks)) for tasks in _tasks(world))
    old, new = _tasks(world)
    tasks = new if way == "from_start" else old
    learner = _learner(now if way == "from_start" else was, seed)
    scores, labels, seen, own_at = [], [], 0, 0
    for block in _blocks(stream, before + after, batch_size):
        if seen == before and way not in ("from_start", "without"):
            learner, tasks = _changed(learner, SchemaChange(was, now), way, seed), new
        result = learner.step(learner.prepare(_of_tasks(block, tasks)))
        if seen >= before:
            scores.append(result.scores.numpy().copy())
            labels.append(block.labels[:, tasks])
        seen += len(block)
        if way == "carried" and not own_at and learner.own_experts:
            own_at = seen - before
    figures = dict(_aucs(np.concatenate(scores), np.concatenate(labels), has_new=way != "without"))
    return figures | ({"own_experts_at": own_at} if way == "carried" else {})


def _changed(learner: Learner, change: SchemaChange, way: str, seed: int) -> Learner:
    changed = _learner(change.now, seed)
    if way == "anew":
        return changed
    state = carry_over(learner.state(), change, learner.config, OptimizerConfig(), seed)
    if way != "carried":
        state = {name: tensor for name, tensor in state.items() if not name.startswith("probe.")}
    changed.load_state(state)
    if way == "own_at_once":
        changed.give_own_experts([change.now.num_tasks - 1])
    return changed


def _tasks(world: str) -> tuple[list[int], list[int]]:
    return [*TASKS], [*TASKS, WORLDS[world]]


def _learner(schema: Schema, seed: int) -> Learner:
    return Learner(schema, ModelConfig(), OptimizerConfig(), device=_CPU, seed=seed)


def _blocks(world: RareWorld, instances: int, batch_size: int) -> Iterator[ExampleBlock]:
    return (block for block, _ in world.stream(instances, batch_size))


def _of_tasks(block: ExampleBlock, tasks: Sequence[int]) -> ExampleBlock:
    names = ("labels", "label_mask", "feedback_arrival_ms", "late_share", "served_scores")
    columns = {name: np.ascontiguousarray(getattr(block, name)[:, tasks]) for name in names}
    return replace(block, **columns)


def _aucs(scores_NT: F32, labels_NT: F32, *, has_new: bool) -> Iterator[tuple[str, float]]:
    """AUC of each part: the first 16,384 instances, then parts that double the length so far."""
    edges, end = [0], FIRST_PART
    while end <= len(labels_NT):
        edges.append(end)
        end *= 2
    for first, last in pairwise(edges):
        aucs = [
            float(roc_auc_score(labels_NT[first:last, t], scores_NT[first:last, t])) for t in range(labels_NT.shape[1])
        ]
        old = aucs[:-1] if has_new else aucs
        yield f"old_{last}", float(np.mean(old))
        if has_new:
            yield f"new_{last}", aucs[-1]


def measure(options: argparse.Namespace) -> dict[str, float]:
    """The flat object that ``--json`` writes: means over the seeds, and every seed's own figures."""
    figures: dict[str, float] = {}
    for world in options.worlds:
        for way in options.ways:
            each = []
            for seed in options.seeds:
                each.append(run(world, way, seed, options.before, options.after, options.batch))
                figures |= {f"{world}.{way}.{name}.seed{seed}": value for name, value in each[-1].items()}
                print(f"{world} {way} seed {seed}: {each[-1]}", flush=True)
            figures |= {f"{world}.{way}.{name}": float(np.mean([f[name] for f in each])) for name in each[0]}
    return figures


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.new_task", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worlds", nargs="+", choices=list(WORLDS), default=list(WORLDS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--before", type=int, default=65_536)
    parser.add_argument("--after", type=int, default=262_144)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = measure(options)
    show({name: value for name, value in figures.items() if ".seed" not in name})
    save(figures, options.json)


if __name__ == "__main__":
    main()
