"""One ranker with one seed through ``smes backtest`` on a KuaiRand folder, every score kept on disk.

Kept are two scores of every example and binary task, see :mod:`trainer.evaluation`: that of the frozen copy of the
weights, which windowed GAUC is made of, and the progressive one, by the weights just before their step, which AUC and
normalised entropy are made of. What they are scores of (user, group, window, labels) is the same for all rankers that
read the stream in the same batches, and is kept once. Memory does not grow with the log.

Letters: B instances, T binary tasks, in the order of the schema.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from benchmarks.flops import FlopTally, cost_of
from benchmarks.quality_config import Settings, build_config, key_of
from benchmarks.run_cache import RunCache, RunResult
from simulators.logs.reader import open_log
from smes.arrays import F32, I64, Arrays
from smes.events import ExampleBlock
from smes.model.frozen_model import FrozenModel
from smes.model.learner import Learner
from smes.schema import MISSING, Schema
from smes_cli.backtest import run_backtest
from smes_cli.config import Config
from smes_cli.console import console
from trainer.evaluation import ProgressiveEvaluation
from trainer.observers import StepFigures

_COUNTED_EVERY = 32  # calls of a frozen copy
_NO_LABEL = 2
_DTYPES: dict[str, Any] = {
    "user": np.int64,
    "group": np.int64,
    "window": np.int32,
    "labels": np.uint8,
    "frozen": np.float32,
    "progressive": np.float32,
}
_OF_STREAM = ("user", "group", "window", "labels")
_OF_RUN = ("frozen", "progressive")


@dataclass(frozen=True)
class LogRun:
    """One ranker with one seed.

    Attributes:
        ranker: Its name in the comparison.
        settings: Its settings, dotted.
        log: The folder.
        limit: Only the first so many impressions; None for all.
        seed: Of its first weights, dense ones and embeddings.
    """

    ranker: str
    settings: Settings
    log: Path
    limit: int | None
    seed: int

    @property
    def title(self) -> str:
        return f"{self.ranker}, seed {self.seed}"

    @property
    def key(self) -> str:
        return f"{self.ranker}-log-{self.seed}-{key_of(self.config, **self._log(), seed=self.seed)}"

    @property
    def stream_key(self) -> str:
        """The same for all runs that see the same batches in the same windows."""
        config = self.config
        alike = replace(
            Config(), stream=config.stream, trainer=replace(Config().trainer, evaluation=config.trainer.evaluation)
        )
        return f"stream-{key_of(alike, **self._log())}"

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the binary tasks."""
        return _binary_tasks(self.config.schema_file(self.log).schema)

    @property
    def config(self) -> Config:
        config = build_config(self.settings, self.ranker)
        return replace(config, trainer=replace(config.trainer, seed=self.seed))

    def _log(self) -> dict[str, Any]:
        files = sorted((path.name, path.stat().st_size) for path in self.log.rglob("*.csv"))
        schema = self.config.schema_file(self.log).schema.hash
        return {"files": files, "limit": self.limit, "schema": schema, "columns": list(_DTYPES)}

    def execute(self, cache: RunCache) -> RunResult:
        config, built = self.config, []
        with ExitStack() as stack:
            columns = stack.enter_context(_Columns(cache.folder, self.key, self.stream_key))

            def evaluate(config: Config, learner: Learner) -> ProgressiveEvaluation:
                built.append((learner, RecordingEvaluation(config, learner, columns)))
                return built[-1][1]

            stack.enter_context(_quiet())
            started_s = time.monotonic()
            result = run_backtest(
                config, self.log, limit=self.limit, seed=0, baseline=None, should_stop=lambda: False, evaluate=evaluate
            )
            seconds = time.monotonic() - started_s
        ((learner, evaluation),) = built
        report = result.report
        cost = cost_of(learner.schema, config.model, evaluation.tally, report.active_experts.mean)
        facts = {
            **asdict(cost),
            "flops": cost.flops,
            "active_experts": report.active_experts.mean,
            "tasks": {name: asdict(metrics) for name, metrics in evaluation.report().items()},
            "trained": report.events.trained,
            "seconds": seconds,
            "memory_mib": max(mib for _, mib in result.memory_mib),
        }
        return RunResult({}, facts)

    def columns(self, cache: RunCache) -> "LogColumns":
        """What the run kept, read from disk as it is asked for."""
        names = {**dict.fromkeys(_OF_STREAM, self.stream_key), **dict.fromkeys(_OF_RUN, self.key)}
        tasks = len(self.tasks)
        columns = {name: _read(_file(cache.folder, key, name), name, tasks) for name, key in names.items()}
        if len({len(column) for column in columns.values()}) > 1:
            raise ValueError(f"cache {cache.folder}: scores of {self.title} of another stream, expected another folder")
        if columns["window"][-1] == 0:
            raise ValueError(f"{self.log}: one window, expected a log longer than its first window")
        return LogColumns(**columns)


@dataclass(frozen=True)
class LogColumns:
    """Scored examples in the order of the stream, all on disk.

    Attributes:
        user: int64.
        group: int64, the request, or the user; within a window.
        window: int32, ascending; window 0 is scored by weights that have seen nothing.
        labels: uint8, by binary task: 0, 1, or 2 for none.
        frozen: float32, likewise: probabilities by the copy of the weights from the window's start.
        progressive: The same by the weights just before the step on the example; NaN where that step was not taken.
    """

    user: NDArray[Any]
    group: NDArray[Any]
    window: NDArray[Any]
    labels: NDArray[Any]
    frozen: NDArray[Any]
    progressive: NDArray[Any]

    def windows(self) -> Iterator[slice]:
        """The rows of each window that windowed GAUC counts: all but window 0."""
        first = int(np.searchsorted(self.window, 0, side="right"))
        while first < len(self.window):
            last = int(np.searchsorted(self.window, self.window[first], side="right"))
            yield slice(first, last)
            first = last


class RecordingEvaluation(ProgressiveEvaluation):
    """Progressive evaluation that keeps all scores, and counts what those of the frozen copies execute.

    Args:
        config: Window bounds and device.
        learner: The weights.
        columns: Where the scores go.
    """

    def __init__(self, config: Config, learner: Learner, columns: "_Columns") -> None:
        device = config.trainer.open_device()
        self.tally = FlopTally()
        self._columns = columns
        self._tasks = [learner.schema.task_index[name] for name in _binary_tasks(learner.schema)]
        self._window_number = -1
        self._calls = 0
        self._scored: list[tuple[int, F32]] = []

        def recorded(model: FrozenModel) -> "_Recorded":
            self._window_number += 1
            return _Recorded(self, model)

        super().__init__(
            learner.schema,
            config.trainer.evaluation,
            freeze=lambda: recorded(FrozenModel.freeze(learner, device)),
            thaw=lambda state: recorded(FrozenModel.thaw(learner, state, device)),
            scored_together=1,
        )

    def before_step(self, examples: ExampleBlock) -> None:
        self._scored = []
        super().before_step(examples)
        assert np.isnan(examples.served_scores).all(), "a log carries no served scores"
        scores_BT = np.concatenate([scores for _, scores in self._scored])
        window_B = np.concatenate([np.full(len(scores), window, np.int32) for window, scores in self._scored])
        labels_BT = np.where(examples.label_mask, examples.labels > 0.5, _NO_LABEL).astype(np.uint8)
        # The sign bit keeps users' groups apart from requests.
        group_B = np.where(examples.request_id != MISSING, examples.request_id, examples.user_id | MISSING)
        self._columns.add(
            user=examples.user_id,
            group=group_B,
            window=window_B,
            labels=labels_BT[:, self._tasks],
            frozen=scores_BT[:, self._tasks],
        )

    def after_step(self, examples: ExampleBlock, figures: StepFigures) -> None:
        super().after_step(examples, figures)
        self._columns.add(progressive=figures.scores[:, self._tasks])

    def after_failed_step(self, examples: ExampleBlock) -> None:
        super().after_failed_step(examples)
        self._columns.add(progressive=np.full((len(examples), len(self._tasks)), np.nan))

    def keep(self, model: FrozenModel, ids: I64, numerics: F32, now_ms: I64 | int | None) -> F32:
        """Score with a frozen copy, and note the scores."""
        self._calls += 1
        if self._calls % _COUNTED_EVERY:
            scores = model.score(ids, numerics, now_ms)
        else:
            with self.tally.counting(len(ids)):
                scores = model.score(ids, numerics, now_ms)
        self._scored.append((self._window_number, scores))
        return scores


@dataclass(frozen=True)
class _Recorded:
    """A frozen copy whose scores are noted."""

    evaluation: RecordingEvaluation
    model: FrozenModel

    def score(self, ids: I64, numerics: F32, now_ms: I64 | int | None = None) -> F32:
        return self.evaluation.keep(self.model, ids, numerics, now_ms)

    def state(self) -> Arrays:
        return self.model.state()

    def close(self) -> None:
        self.model.close()


class _Columns:
    """Columns that grow on disk; under their names only when all is written."""

    def __init__(self, folder: Path, run_key: str, stream_key: str) -> None:
        self._paths = {name: _file(folder, run_key if name in _OF_RUN else stream_key, name) for name in _DTYPES}
        # Runs side by side each write the stream's columns, and the last one's stay: they are the same.
        self._unfinished = {name: path.with_name(f"{run_key}.{name}.unfinished") for name, path in self._paths.items()}
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> "_Columns":
        self._files = {name: path.open("wb") for name, path in self._unfinished.items()}
        return self

    def add(self, **columns: NDArray[Any]) -> None:
        for name, values in columns.items():
            self._files[name].write(np.ascontiguousarray(values, _DTYPES[name]).data)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for file in self._files.values():
            file.close()
        for name, path in self._unfinished.items():
            if kind is None:
                path.replace(self._paths[name])
            else:
                path.unlink()


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the backtest's own progress output: many runs are under way."""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


def impressions_before(config: Config, log: Path, days: float) -> int:
    """How many impressions the first so many days of a log have, counted from the first one."""
    count, end_ms = 0, None
    with open_log(log, config.schema_file(log)) as reader:
        for block in reader.blocks():
            time_ms = block.impressions.event_time_ms
            end_ms = int(time_ms[0]) + round(days * 86_400_000) if end_ms is None else end_ms
            count += int((time_ms < end_ms).sum())
            if time_ms[-1] >= end_ms:
                break
    return count


def _binary_tasks(schema: Schema) -> tuple[str, ...]:
    return tuple(task.name for task in schema.tasks if task.kind == "binary")


def _file(folder: Path, key: str, name: str) -> Path:
    return folder / f"{key}.{name}"


def _read(path: Path, name: str, tasks: int) -> NDArray[Any]:
    width = 1 if name in ("user", "group", "window") else tasks
    dtype = np.dtype(_DTYPES[name])
    rows = path.stat().st_size // (dtype.itemsize * width)
    if rows == 0:
        raise ValueError(f"{path.name}: no scored example, expected a log with impressions")
    shape = (rows,) if name in ("user", "group", "window") else (rows, tasks)
    return np.memmap(path, dtype, mode="r", shape=shape)
