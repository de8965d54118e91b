"""What a log holds beyond its ledger: different ids, fill rates, delays against windows, features that tell a label.

One pass over the log's blocks, in bounded memory. Letters: N rows, W id columns, F numerics, T tasks, S rows of the
sample.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from simulators.delays import FeedbackTimes
from simulators.logs.distinct import DistinctIds
from simulators.logs.leaks import LEAST_EACH, SUSPECT_AUC, alone, codes_of
from simulators.logs.reader import LogBlock, LogReader, row_bytes
from smes.arrays import F32, F64, I64
from smes.derive import UNKNOWN, Derivations, count_boundaries
from smes.derived import in_order
from smes.hashing import splitmix64
from smes.schema import ITEM_ID, MISSING, USER_ID, Feature, Schema, Task

_SAMPLE_ROWS = 40_000
_SAMPLE_BYTES = 48 << 20
_FEW_POSITIVES = 100
_MOST_LATE = 0.01


@dataclass(frozen=True, slots=True)
class InputProfile:
    """One input of the model, over the impressions.

    Attributes:
        name, kind, source: Of the feature; of a derived one ``source`` is ``derived``.
        distinct: Different ids; None for a number. Exact up to 16,383, beyond that about 0.8 % off.
        filled: Share of impressions with a value.
        task, auc: The label that it tells best alone, and how well (:func:`simulators.logs.leaks.alone`); None if no
            label has enough outcomes in the sample.
        equals: A task whose outcome it is, value by value; None for none.
    """

    name: str
    kind: str
    source: str
    distinct: int | None
    filled: float
    task: str | None
    auc: float | None
    equals: str | None


@dataclass(frozen=True, slots=True)
class DelayProfile:
    """When a task's feedback comes, after its impression.

    Attributes:
        task, window_s: Of the task.
        logged: Whether the log has its time; else delays are drawn.
        outcomes: Feedback in the sample; 0: the quantiles are None.
        p50_s, p90_s, p99_s: Quantiles of the delay in seconds.
        late: Share of the feedback after the window, which does not count; of drawn delays before they are cut at it.
    """

    task: str
    window_s: float
    logged: bool
    outcomes: int
    p50_s: float | None
    p90_s: float | None
    p99_s: float | None
    late: float


@dataclass(frozen=True, slots=True)
class LogProfile:
    """What :func:`profile` found.

    Attributes:
        impressions: How many were looked at.
        sampled: How many of them delays and labels were compared on, from all over the log.
        inputs: In the schema's order, derived ones last. Buckets by quantiles, and what is made of them, are left out:
            their boundaries are known only when the model has seen the stream.
        delays: By task.
        vocabularies: Vocabulary → different ids.
        warnings: What to look at before a run, one line each.
    """

    impressions: int
    sampled: int
    inputs: tuple[InputProfile, ...]
    delays: tuple[DelayProfile, ...]
    vocabularies: dict[str, int]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def profile(reader: LogReader, seed: int = 0, progress: Callable[[int], None] = lambda done: None) -> LogProfile:
    """Go over a log's impressions once.

    Args:
        reader: The log; within its limit.
        seed: Of the delays that are drawn.
        progress: Called with the number of impressions seen.

    Raises:
        LogError: The log is unfit, or cannot be read.
    """
    schema = reader.schema
    columns = _Columns(schema)
    sample = _Sample(reader, FeedbackTimes(schema, reader.spec, seed), columns)
    ids = {f.name: DistinctIds() for f in columns.features if f.kind != "numeric"}
    filled, seen = dict.fromkeys((f.name for f in columns.features), 0), 0
    for block in reader.blocks():
        values_of = columns(block)
        for feature in columns.features:
            values = values_of[feature.name]
            there = np.isfinite(values) if feature.kind == "numeric" else values != MISSING
            filled[feature.name] += int(there.any(axis=1).sum())
            if feature.kind != "numeric":
                ids[feature.name].add(values[there].astype(np.int64))
        sample.add(block)
        seen += len(block)
        progress(seen)
    vocabularies: dict[str, DistinctIds] = {}
    read = {feature.name for feature in schema.inputs.id_features}
    for feature in columns.features:
        if feature.name in ids and feature.name in read:
            vocabularies.setdefault(feature.vocabulary_name, DistinctIds()).join(ids[feature.name])
    built = () if schema.history is None else (schema.history.items, schema.history.outcomes)
    rows = sample.rows()
    inputs = [
        _input(feature, filled[feature.name] / max(seen, 1), ids.get(feature.name), rows, schema)
        for feature in columns.features
        if feature.name not in built
    ]
    delays = [_delay(reader, index, task, rows) for index, task in enumerate(schema.tasks)]
    counts = {name: counted.count() for name, counted in vocabularies.items()}
    warnings = (*_of_inputs(inputs), *_of_delays(delays), *_of_labels(schema, reader, seen))
    return LogProfile(seen, len(rows), tuple(inputs), tuple(delays), counts, warnings)


class _Columns:
    """What the features of a block's impressions hold, and the derived ones that depend on a row alone.

    Attributes:
        features: All of them.
    """

    def __init__(self, schema: Schema) -> None:
        self._schema, self._derive = schema, Derivations(schema)
        self._unknown = np.full(count_boundaries(schema), UNKNOWN, np.float32)
        learned = {d.name for d in self._derive.quantiles}
        for derived in in_order(schema.derived):
            if learned & {*derived.of}:
                learned.add(derived.name)
        known = {d.name for d in schema.derived} - learned
        self._derived = tuple(f for f in schema.inputs.features if f.name in known)
        self.features = (*schema.features, *self._derived)

    def __call__(self, block: LogBlock) -> dict[str, Any]:
        """Name → its columns [N, width]."""
        schema, impressions = self._schema, block.impressions
        values = {f.name: _values(schema, f, impressions.ids, impressions.numerics) for f in schema.features}
        if self._derived:
            made = self._derive(impressions.ids, impressions.numerics, impressions.event_time_ms, self._unknown)
            values |= {f.name: _values(schema.inputs, f, made.ids, made.numerics) for f in self._derived}
        return values


class _Sample:
    """Every n-th impression, so many that they fit into memory."""

    def __init__(self, reader: LogReader, times: FeedbackTimes, columns: _Columns) -> None:
        self._columns = columns
        most = min(_SAMPLE_ROWS, _SAMPLE_BYTES // row_bytes(reader.schema))
        self._step = max(-(-reader.total // most), 1)
        self._times, self._seen = times, 0
        self._blocks: list[LogBlock] = []
        self._feedback: list[I64] = []

    def add(self, block: LogBlock) -> None:
        rows = np.arange(-self._seen % self._step, len(block), self._step)
        self._seen += len(block)
        times = None if block.outcome_time_ms is None else block.outcome_time_ms[rows]
        taken = LogBlock(block.impressions.take(rows), block.outcomes[rows], times)
        self._blocks.append(taken)
        self._feedback.append(self._times.times(taken))

    def rows(self) -> "_Rows":
        if not self._blocks:
            return _Rows(np.empty((0, 0)), np.empty(0, np.int64), np.empty((0, 0), np.int64), {}, {})
        features, blocks = self._columns.features, [self._columns(block) for block in self._blocks]
        values = {f.name: np.concatenate([block[f.name] for block in blocks]) for f in features}
        return _Rows(
            np.concatenate([block.outcomes for block in self._blocks]).astype(np.float64),
            np.concatenate([block.impressions.event_time_ms for block in self._blocks]),
            np.concatenate(self._feedback),
            values,
            {f.name: _codes(f, values[f.name]) for f in features},
        )


@dataclass(frozen=True, slots=True)
class _Rows:
    """The sample, and what the features hold in it: by name, as they are and numbered."""

    outcomes_ST: F64
    event_time_ms: I64
    feedback_ms_ST: I64
    values: dict[str, Any]
    codes: dict[str, I64]

    def __len__(self) -> int:
        return len(self.event_time_ms)


def _values(schema: Schema, feature: Feature, ids_NW: I64, numerics_NF: F32) -> Any:
    """A feature's columns, [N, width]."""
    if feature.kind == "numeric":
        column = schema.numeric_features.index(feature)
        return numerics_NF[:, column : column + 1]
    return ids_NW[:, schema.id_slices[feature.name]]


def _codes(feature: Feature, values_SX: Any) -> I64:
    """A feature's values numbered; of a list the ids together, whatever their order."""
    if feature.is_list:
        with np.errstate(over="ignore"):
            mixed = splitmix64(values_SX.ravel()).reshape(values_SX.shape).sum(axis=1, dtype=np.uint64)
        return codes_of(mixed)
    return codes_of(values_SX[:, 0])


def _input(feature: Feature, filled: float, ids: DistinctIds | None, rows: _Rows, schema: Schema) -> InputProfile:
    best: tuple[float, str] | None = None
    equals = None
    for index, task in enumerate(schema.tasks) if len(rows) else ():
        outcome_S = rows.outcomes_ST[:, index]
        if feature.kind == "numeric" and _equal(rows.values[feature.name][:, 0], outcome_S):
            equals = task.name
        truth_S, there = _truth(task, outcome_S)
        found = alone(rows.codes[feature.name][there], truth_S[there])
        if found is not None and (best is None or found > best[0]):
            best = found, task.name
    return InputProfile(
        feature.name,
        feature.kind,
        "derived" if feature.name in [d.name for d in schema.derived] else feature.source,
        None if ids is None else ids.count(),
        filled,
        None if best is None else best[1],
        None if best is None else best[0],
        equals,
    )


def _truth(task: Task, outcome_S: F64) -> tuple[F64, Any]:
    """A label as 0 and 1, and which rows have it; of a regression, whether it is above the median."""
    there = ~np.isnan(outcome_S)
    if task.kind == "binary":
        return np.where(there, outcome_S, 0.0), np.ones(len(outcome_S), bool)
    middle = float(np.median(outcome_S[there])) if there.any() else 0.0
    return (outcome_S > middle).astype(np.float64), there


def _equal(values_S: F32, outcome_S: F64) -> bool:
    both = np.isfinite(values_S) & np.isfinite(outcome_S)
    if both.sum() < LEAST_EACH or len(np.unique(outcome_S[both])) < 2:
        return False
    return bool(np.mean(np.abs(values_S[both] - outcome_S[both]) <= 1e-6 * np.abs(outcome_S[both])) > 0.999)


def _delay(reader: LogReader, index: int, task: Task, rows: _Rows) -> DelayProfile:
    source = reader.spec.labels[task.name]
    logged = source.time_column is not None
    if not len(rows):
        return DelayProfile(task.name, task.window_s, logged, 0, None, None, None, 0.0)
    there = rows.feedback_ms_ST[:, index] != MISSING
    delays_s = (rows.feedback_ms_ST[there, index] - rows.event_time_ms[there]) / 1000
    late = float((delays_s > task.window_s).mean()) if len(delays_s) else 0.0
    quantiles: list[float | None] = [None, None, None]
    if len(delays_s):
        quantiles = [float(x) for x in np.quantile(delays_s, (0.5, 0.9, 0.99))]
    if not logged:
        late = max(late, _drawn_late(source.delay.median_s, source.delay.sigma, task.window_s))
    p50, p90, p99 = quantiles
    return DelayProfile(task.name, task.window_s, logged, len(delays_s), p50, p90, p99, late)


def _drawn_late(median_s: float, sigma: float, window_s: float) -> float:
    """The share of a lognormal distribution behind a window."""
    from math import erfc, log, sqrt

    if sigma == 0:
        return float(median_s > window_s)
    return 0.5 * erfc(log(window_s / median_s) / (sigma * sqrt(2)))


def _of_inputs(inputs: list[InputProfile]) -> list[str]:
    found = []
    for column in inputs:
        where = f"feature {column.name}"
        if column.name in (USER_ID, ITEM_ID):
            continue
        if column.equals is not None:
            found.append(f"{where} equals the outcome of task {column.equals}: an outcome must never be a feature")
        elif column.auc is not None and column.auc >= SUSPECT_AUC:
            found.append(
                f"{where} alone tells task {column.task} with an AUC of {column.auc:.3f}: is it known before the "
                "outcome?"
            )
        if column.filled == 0:
            found.append(f"{where} has no value in any impression")
        elif column.distinct == 1 and column.filled == 1:
            found.append(f"{where} has the same value in every impression")
    return found


def _of_delays(delays: list[DelayProfile]) -> list[str]:
    found = []
    for delay in delays:
        if delay.late > _MOST_LATE:
            what = "come later than its window" if delay.logged else "are drawn longer than its window, and cut at it"
            found.append(f"task {delay.task}: {delay.late:.1%} of the delays {what} of {delay.window_s:g} s")
        elif (
            delay.logged
            and delay.outcomes >= _FEW_POSITIVES
            and delay.p99_s is not None
            and delay.p99_s < delay.window_s / 4
        ):
            found.append(
                f"task {delay.task}: 99 % of its outcomes come within {delay.p99_s:,.1f} s; the window of "
                f"{delay.window_s:g} s makes every impression wait that long"
            )
    return found


def _of_labels(schema: Schema, reader: LogReader, impressions: int) -> list[str]:
    found = []
    for column in reader.ledger.columns:
        if column.kind == "label" and column.positives is not None:
            if column.positives < _FEW_POSITIVES:
                found.append(f"task {column.name}: {column.positives:,} positives, too few to learn much from")
            elif column.positives == impressions:
                found.append(f"task {column.name}: every impression is a positive, expected outcomes of both kinds")
    return found
