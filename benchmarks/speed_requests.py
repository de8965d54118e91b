"""What it is worth to compute once per request what its items share, in scoring and in training.

    python -m benchmarks.speed_requests --json requests.json

The default SMES on the fields of the speed benchmark, the rows of ids in the scorer's table. Of the 33 id fields, 21
are equal within a request: the user and 20 others. A scoring call has 500 candidates of one request. A training batch
of 1,024 has requests of 8 examples. With `history`, each request also has 50 items that the user saw before, with
target attention. Each round times both sides: the same instances, said to be of requests, and of a request each. What
happens to be shared is equal on both sides, so rows that were just read are in the processor's cache on either.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.speed_setting import Setting
from smes.arrays import F32, I64
from smes.events import ExampleBlock
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.devices import keep_freed_memory
from smes.model.learner import Learner
from smes.model.serving import ServingModel, group_columns, required_keys
from smes.model.serving_rows import ServingTable, TableRows
from smes.rankers.sparse.config import SmesConfig
from smes.schema import Feature, Schema

SHARED_FIELDS = 21
REQUEST_EXAMPLES = 8
HISTORY = 50


@dataclass(frozen=True)
class Pair:
    """The same work with and without request-level compute; either side is called with the number of the round."""

    name: str
    shared: Callable[[int], object]
    apart: Callable[[int], object]


def schema_of(setting: Setting, history: int) -> Schema:
    """The benchmark's fields, and so many items that the user saw before."""
    schema = setting.schema
    if not history:
        return schema
    recent = Feature("recent", kind="sequence", max_length=history, vocabulary="item_id", query="item_id")
    return replace(schema, features=(*schema.features, recent))


def instances(schema: Schema, setting: Setting, rows: int, per_request: int, seed: int) -> I64:
    """Ids as in the speed benchmark, those of the shared columns equal within requests."""
    rng = np.random.default_rng(seed)
    ids: I64 = rng.zipf(1.2, (rows, schema.id_width)) % setting.vocabulary
    shared = np.zeros(schema.id_width, np.bool_)
    shared[0] = shared[setting.num_fields - SHARED_FIELDS + 1 :] = True  # the user, the last fields, the history
    first = (np.arange(rows) // per_request) * per_request
    return np.where(shared, ids[first], ids)


def pairs(setting: Setting, smes: SmesConfig, history: int) -> list[Pair]:
    """Scoring and training, with a history of so many items."""
    schema = schema_of(setting, history)
    config = ModelConfig(embedding_dim=setting.embedding_dim, smes=smes)
    batches = [
        instances(schema, setting, setting.batch_size, REQUEST_EXAMPLES, seed) for seed in range(setting.num_batches)
    ]
    learners = [Learner(schema, config, OptimizerConfig(), device=torch.device("cpu")) for _ in range(2)]
    rng = np.random.default_rng(setting.seed)
    empty = ExampleBlock.empty(schema, setting.batch_size)
    labels = [(rng.random(empty.labels.shape) < 0.1).astype(np.float32) for _ in batches]
    place = np.arange(setting.batch_size)
    blocks = [
        [
            replace(empty, ids=ids, labels=some, label_mask=np.ones(some.shape, np.bool_), request_id=request)
            for ids, some in zip(batches, labels, strict=True)
        ]
        for request in (place // REQUEST_EXAMPLES, place)
    ]

    def step(side: int) -> Callable[[int], object]:
        learner, own = learners[side], blocks[side]
        return lambda n: learner.step(learner.prepare(own[n % len(own)]))

    train = Pair(f"request_level{'_history' if history else ''}_train", step(0), step(1))
    for n in range(setting.num_batches):
        train.shared(n)
        train.apart(n)
    model = serving_model(schema, config, learners[0])
    ids = instances(schema, setting, setting.candidates, setting.candidates, setting.seed + 100)
    numerics: F32 = np.zeros((len(ids), 0), np.float32)
    each = np.arange(len(ids))
    score = Pair(
        f"request_level{'_history' if history else ''}",
        lambda _: model.score(ids, numerics),
        lambda _: model.score(ids, numerics, requests=each),
    )
    difference = np.abs(model.score(ids, numerics) - model.score(ids, numerics, requests=each)).max()
    assert difference < 1e-5, f"scores differ by {difference}"
    return [score, train]


def serving_model(schema: Schema, config: ModelConfig, learner: Learner) -> ServingModel:
    """The learner's weights, the rows in a table as a scorer has it."""
    state = learner.serving_state()
    groups = group_columns(schema, config)
    keys = state["table.keys"].numpy()
    table = ServingTable(groups, len(keys))
    table.add(keys, {name: state[f"table.{name}"].numpy() for name in groups})
    return ServingModel(schema, config, state, TableRows(required_keys(schema, state, len(keys)), table))


def measure(setting: Setting, smes: SmesConfig, repeats: int, calls: int = 10) -> dict[str, list[float]]:
    """Milliseconds of either side and how many times faster the shared one is, by round."""
    rounds: dict[str, list[float]] = {}
    for history in (0, HISTORY):
        for pair in pairs(setting, smes, history):
            for turn in range(repeats):
                sides = [("ms", pair.shared), ("apart_ms", pair.apart)]
                took = {}
                for name, side in sides if turn % 2 else sides[::-1]:
                    took[name] = statistics.median(_seconds(side, turn * calls + n) for n in range(calls)) * 1e3
                    rounds.setdefault(f"{pair.name}_{name}", []).append(took[name])
                rounds.setdefault(f"{pair.name}_speedup", []).append(took["apart_ms"] / took["ms"])
    return rounds


def _seconds(side: Callable[[int], object], turn: int) -> float:
    start = time.perf_counter()
    side(turn)
    return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> int:
    """Print the median of every figure, and write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds, at least 7 to quote")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures to this file, one flat object")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    rounds = measure(Setting(), SmesConfig(), options.repeats)
    figures = {name: statistics.median(values) for name, values in rounds.items()}
    for name, value in figures.items():
        print(f"{name:40} {value:8.2f} ({min(rounds[name]):.2f} – {max(rounds[name]):.2f})")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
