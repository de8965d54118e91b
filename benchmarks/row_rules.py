"""What rules for rows cost, and what rates that follow time and frequency gain.

    python -m benchmarks.row_rules --kuairand PATH/TO/KuaiRand-Pure --json row_rules.json

Rows: KuaiRand, where an id gets its row at its second sighting, and gives it back when it was not seen for three days
or when a budget of three quarters of all ids is used up. Rates: the drifting world of :mod:`benchmarks.freshness_runs`,
with accumulators that forget and rates that fall or rise with an id's frequency. Each setting of rates was written down
before anything was trained with it. Of the rows' the two in which users get their rows at once were added when the
first ones had shown what a user's first label is worth.

Every example is scored just before it is trained on, and counts after the warm-up. AUC and normalised entropy are of
the pooled examples by task, averaged over the seeds; a headline is the mean over the binary tasks with a base rate of
1 % and more. Intervals are by a paired bootstrap over users and positives (:mod:`benchmarks.auc_bootstrap`).

Letters: N examples after the warm-up, T binary tasks, S settings, R resamples.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.auc_bootstrap import TaskExamples, resampled_auc_and_ne
from benchmarks.bootstrap import F64, Interval, Paired
from benchmarks.figures import save
from benchmarks.freshness_runs import DRIFTING, binary_tasks
from benchmarks.quality_config import key_of
from benchmarks.run_cache import RunCache, RunResult, run_missing
from simulators.logs.reader import open_log
from simulators.merge import replay_blocks
from simulators.synthetic import synthesize
from smes.arrays import F32
from smes.events import ExampleBlock
from smes.model.rows_config import RowRules, RowsConfig
from smes_cli.building import build_learner
from smes_cli.config import Config
from smes_cli.console import console
from stream.block_stream import BlockStream
from stream.config import MiniBatchConfig
from trainer.task_figures import RARE_BELOW

DEFAULT = "default"
_DAY_S, _HOUR_S = 86_400.0, 3600.0

_3_DAYS = RowRules(expire_after_s=3 * _DAY_S)
ROWS: dict[str, RowsConfig] = {
    DEFAULT: RowsConfig(),
    "admission": RowsConfig(admit_after=2, shared_rows=64),
    "admission, users at once": RowsConfig(admit_after=2, shared_rows=64, vocabularies={"user_id": RowRules()}),
    "expiry": RowsConfig(expire_after_s=3 * _DAY_S),
    "budget": RowsConfig(budget=33_000),
    "admission and expiry": RowsConfig(2, 64, 3 * _DAY_S, vocabularies={"user_id": _3_DAYS}),
    "all three": RowsConfig(2, 64, 3 * _DAY_S, 13_000, vocabularies={"user_id": replace(_3_DAYS, budget=20_000)}),
}
"""Of KuaiRand: eleven days, 44,000 ids, 26,000 of them users. In the last two settings users get their rows at once."""

RATES: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "half-life 1 h": {"accumulator_half_life_s": _HOUR_S},
    "half-life 6 h": {"accumulator_half_life_s": 6 * _HOUR_S},
    "half-life 1 day": {"accumulator_half_life_s": _DAY_S},
    "power -0.25": {"frequency_power": -0.25},
    "power -0.1": {"frequency_power": -0.1},
    "power 0.1": {"frequency_power": 0.1},
    "rates times 1.5": {"embedding_learning_rate": 0.015, "wide_learning_rate": 0.045},
    "rates times 2": {"embedding_learning_rate": 0.02, "wide_learning_rate": 0.06},
}
"""Of the drifting world. The last two tell what is owed to larger rates alone."""

_BATCH = MiniBatchConfig(size=256, max_wait_s=None)
_WORLD_DAYS, _WORLD_WARM_UP, _KUAIRAND_WARM_UP = 4.0, 0.25, 0.1  # the warm-ups are shares of all examples
_KUAIRAND_IMPRESSIONS = 190_000  # more than the slice has


@dataclass(frozen=True)
class RuleRun:
    """One setting with one seed.

    Attributes:
        log: A KuaiRand folder; None for the drifting world, which is another one for each seed.
        setting: A name in :data:`ROWS` or :data:`RATES`.
        seed: Of the first weights, and of the world.
        impressions: The log's first so many.
    """

    log: Path | None
    setting: str
    seed: int
    impressions: int

    @property
    def title(self) -> str:
        return f"{'KuaiRand' if self.log else 'drifting world'}, {self.setting}, seed {self.seed}"

    @property
    def key(self) -> str:
        world = asdict(DRIFTING) if self.log is None else {}
        rows = asdict(self.config.rows)
        return f"rules-{key_of(self.config, rows=rows, seed=self.seed, limit=self.impressions, **world)}"

    @property
    def config(self) -> Config:
        config = Config(schema="kuairand" if self.log else "synthetic")
        rates: dict[str, Any] = RATES[self.setting] if self.log is None else {}
        return replace(
            config,
            stream=replace(config.stream, batch=_BATCH),
            optimizer=replace(config.optimizer, **rates),
            rows=ROWS[self.setting] if self.log else RowsConfig(),
            trainer=replace(config.trainer, seed=self.seed, device="cpu"),
        )

    def execute(self, cache: RunCache) -> RunResult:
        """Scores float32 [N, T], labels and masks [N, T], users [N]."""
        started_s = time.monotonic()
        schema = self.config.schema_file().schema
        learner, tasks = build_learner(self.config, schema), binary_tasks(schema)
        columns: dict[str, list[NDArray[Any]]] = {"scores": [], "labels": [], "mask": [], "user": []}
        for examples in self._examples():
            result = learner.step(learner.prepare(examples))
            columns["scores"].append(result.scores.numpy()[:, tasks].copy())
            columns["labels"].append(examples.labels[:, tasks].astype(np.uint8))
            columns["mask"].append(examples.label_mask[:, tasks])
            columns["user"].append(examples.user_id)
        arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
        first = int((_KUAIRAND_WARM_UP if self.log else _WORLD_WARM_UP) * len(arrays["user"]))
        facts = {
            "tasks": [schema.tasks[t].name for t in tasks],
            "rows": learner.num_rows,
            "seconds": time.monotonic() - started_s,
        }
        return RunResult({name: array[first:] for name, array in arrays.items()}, facts)

    def _examples(self) -> Iterator[ExampleBlock]:
        schema_file = self.config.schema_file()
        with self._path() as path, open_log(path, schema_file, limit=self.impressions) as reader:
            stream = BlockStream(schema_file.schema, self.config.stream.join, _BATCH, replay_blocks(reader, 0))
            while not stream.ended:
                stream.poll(0)
                while (batch := stream.next_batch()) is not None:
                    yield batch

    @contextmanager
    def _path(self) -> Iterator[Path]:
        if self.log is not None:
            yield self.log
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "world.parquet"
            synthesize(path, self.impressions, self.seed, config=DRIFTING)
            yield path


@dataclass(frozen=True)
class RuleFigures:
    """Settings side by side, on one log.

    Attributes:
        tasks: Of the headline.
        rows: Setting → rows in use at the end, of the first seed.
        auc, ne: Of these tasks.
    """

    tasks: tuple[str, ...]
    rows: Mapping[str, int]
    auc: Paired
    ne: Paired


def rule_figures(log: Path | None, seeds: int, impressions: int, cache: RunCache, resamples: int) -> RuleFigures:
    """Figures of all settings on a log; the cache has the runs."""
    settings = tuple(ROWS if log else RATES)
    auc: list[F64] = []
    ne: list[F64] = []
    for seed in range(seeds):
        runs = [cache.load(RuleRun(log, setting, seed, impressions)) for setting in settings]
        if seed == 0:
            facts, arrays = [run.facts for run in runs], runs[0].arrays
            rates = (arrays["labels"] * arrays["mask"]).sum(axis=0) / arrays["mask"].sum(axis=0)
            dense = np.flatnonzero(rates >= RARE_BELOW).tolist()
        # The examples are the same for all seeds in KuaiRand, so the draws are, too; each world has its own users.
        auc_RST, ne_RST = _resampled([run.arrays for run in runs], dense, resamples, 0 if log else seed)
        auc.append(auc_RST)
        ne.append(ne_RST)
    auc_RST, ne_RST = np.mean(auc, axis=0), np.mean(ne, axis=0)
    return RuleFigures(
        tuple(facts[0]["tasks"][t] for t in dense),
        {setting: of["rows"] for setting, of in zip(settings, facts, strict=True)},
        Paired(settings, auc_RST[0], auc_RST[1:]),
        Paired(settings, ne_RST[0], ne_RST[1:]),
    )


def _resampled(
    arrays: Sequence[Mapping[str, NDArray[Any]]], tasks: Sequence[int], resamples: int, seed: int
) -> tuple[F64, F64]:
    """(AUC, normalised entropy) of all settings over the same examples, both [1 + R, S, T]."""
    first = arrays[0]
    users, user_N = np.unique(first["user"], return_inverse=True)
    auc = np.empty((1 + resamples, len(arrays), len(tasks)))
    ne = np.empty_like(auc)
    for column, t in enumerate(tasks):
        rows = np.flatnonzero(first["mask"][:, t])
        examples = TaskExamples(user_N.ravel()[rows], first["labels"][rows, t] == 1, len(users), t)

        def scores(m: int, rows: NDArray[np.int64] = rows, t: int = t) -> F32:
            of_setting: F32 = arrays[m]["scores"][rows, t]
            return of_setting

        auc[..., column], ne[..., column] = resampled_auc_and_ne(examples, scores, len(arrays), resamples, seed)
    return auc, ne


def rule_table(name: str, figures: RuleFigures) -> str:
    """A table in Markdown: each setting's headline, and by how much it differs from the default."""
    lines = [
        f"{name}, mean of {', '.join(figures.tasks)}",
        "",
        "| setting | rows | AUC | against the default | normalised entropy | against the default |",
        "|---|---|---|---|---|---|",
    ]
    for setting in figures.auc.names:
        cells = [setting, f"{figures.rows[setting]:,}"]
        for paired in (figures.auc, figures.ne):
            difference = "" if setting == DEFAULT else _shown(paired.difference(setting, DEFAULT))
            cells += [f"{paired.mean(setting):.4f}", difference]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _shown(interval: Interval) -> str:
    return f"{interval.value:+.4f} ({interval.low:+.4f} … {interval.high:+.4f})"


def rule_json(name: str, figures: RuleFigures) -> dict[str, float]:
    """One flat object: what each setting loses in AUC, and gains in normalised entropy."""
    flat: dict[str, float] = {}
    for setting in figures.auc.names[1:]:
        loss = figures.auc.difference(DEFAULT, setting)
        key = f"{name}_{setting}".replace(",", "").replace(" ", "_").replace("-", "minus_")
        flat |= {f"{key}_auc_loss": loss.value, f"{key}_auc_loss_low": loss.low, f"{key}_auc_loss_high": loss.high}
        flat[f"{key}_ne_gain"] = figures.ne.difference(DEFAULT, setting).value
    return flat


def main() -> None:
    """Print the tables; ``--json FILE`` also writes the figures as one flat object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--kuairand", type=Path, help="a KuaiRand folder; without it, the drifting world alone")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share", type=float, default=1.0, help="of the logs; less than 1 only to try it")
    parser.add_argument("--processes", type=int, default=2, help="runs at once, each on one thread")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--cache", type=Path, default=Path("build/row_rules"), help="folder of finished runs")
    arguments = parser.parse_args()
    console.quiet = True
    cache = RunCache(arguments.cache)
    world = round(arguments.share * _WORLD_DAYS * _DAY_S * DRIFTING.impressions_per_s)
    logs: dict[str, tuple[Path | None, int]] = {"drifting_world": (None, world)}
    if arguments.kuairand is not None:
        logs = {"kuairand": (arguments.kuairand, round(arguments.share * _KUAIRAND_IMPRESSIONS)), **logs}
    runs = [
        RuleRun(log, setting, seed, impressions)
        for log, impressions in logs.values()
        for seed in range(arguments.seeds)
        for setting in (ROWS if log else RATES)
    ]
    run_missing(runs, cache, arguments.processes)
    flat: dict[str, float] = {}
    for name, (log, impressions) in logs.items():
        figures = rule_figures(log, arguments.seeds, impressions, cache, arguments.resamples)
        print(rule_table(name.replace("_", " "), figures))
        flat |= rule_json(name, figures)
    save(flat, arguments.json)


if __name__ == "__main__":
    main()
