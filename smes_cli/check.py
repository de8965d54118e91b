"""``smes check``: read a log, print its ledger and what else it holds, and say whether it can be trained on."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from simulators.logs.ledger import LogLedger, problems, utc
from simulators.logs.profile import LogProfile, profile
from simulators.logs.reader import LogReader, open_log
from smes.errors import LogError
from smes_cli.config import Config
from smes_cli.console import console, number, progress, write_report
from smes_cli.log_tables import plain_table, print_ledger
from smes_io.clock import wall_clock_ms
from stream.codec.validation import EARLIEST_MS

if TYPE_CHECKING:
    from smes_cli.run_estimate import RunEstimate

_SPARSE = 0.25  # a mini-batch this full is called small


def run_check(
    config: Config,
    log: Path,
    *,
    limit: int | None,
    max_rejected: float | None,
    report: Path | None,
    estimate: bool = True,
) -> LogLedger:
    """Print the ledger of a log and what is worth knowing before a run; nothing is appended or kept.

    Args:
        config: Its schema is used; for the estimate also its model, stream and evaluation.
        log: A folder or file; see :func:`simulators.logs.reader.open_log`.
        limit: Only the first so many impressions; rows are counted in the whole log.
        max_rejected: Largest share of unusable rows; None: the schema file's.
        report: Where to write all of it as JSON, if anywhere. It is written whether or not the log is fit.
        estimate: Whether to run the training loop for about two seconds to say how long a backtest will take.

    Raises:
        LogError: The log cannot be read as its schema file says, or its ledger shows that it is unfit.
    """
    schema_file = config.schema_file(log)
    with open_log(log, schema_file, limit=limit, max_rejected=max_rejected) as reader:
        started_s = time.monotonic()
        ledger = reader.ledger
        found = problems(ledger, max_rejected=reader.max_rejected, now_ms=wall_clock_ms())
        if found:
            write_report(ledger.to_dict() | {"problems": found}, report)
            print_ledger(ledger, every_column=True)
            raise LogError("; ".join(found))
        seen = _profile(config, reader)
        expected = _estimate(config, reader, seen, time.monotonic() - started_s) if estimate else None
    warnings = [*_of_times(ledger), *seen.warnings, *([] if expected is None else _of_batches(config, expected))]
    more = seen.to_dict() | {"warnings": warnings, "run": None if expected is None else expected.to_dict()}
    write_report(ledger.to_dict() | {"problems": found, "profile": more}, report)
    print_ledger(ledger, every_column=True)
    _print_profile(seen)
    if expected is not None:
        _print_estimate(expected, seen.impressions)
    for warning in warnings:
        console.print(f"look at: {warning}", highlight=False, soft_wrap=True)
    console.print("the log is fit to be trained on", highlight=False)
    return ledger


def _profile(config: Config, reader: LogReader) -> LogProfile:
    with progress("check", reader.total) as advance:
        return profile(reader, config.replay.seed, advance)


def _estimate(config: Config, reader: LogReader, seen: LogProfile, reading_s: float) -> "RunEstimate | None":
    from smes_cli.run_estimate import FEWEST, estimate_run  # imports torch

    return None if seen.impressions < FEWEST else estimate_run(config, reader, seen, reading_s)


def _of_times(ledger: LogLedger) -> list[str]:
    first = ledger.first_event_ms
    if first is None or first >= EARLIEST_MS or ledger.counts_from_zero:
        return []
    return [f"the first event is of {utc(first)}: live events are refused before {utc(EARLIEST_MS)}, also of a replay"]


def _of_batches(config: Config, expected: "RunEstimate") -> list[str]:
    batch = config.stream.batch
    if expected.per_batch >= _SPARSE * batch.size:
        return []
    return [
        f"mini-batches hold {expected.per_batch:,.1f} impressions of at most {batch.size} "
        f"(stream.batch.size), because no more come within {batch.max_age_s:g} s of event time "
        "(stream.batch.max_age_s): a longer time trains faster"
    ]


def _print_profile(seen: LogProfile) -> None:
    inputs = plain_table("input", ">kind", ">of", "different", "filled", "AUC alone", ">of task")
    for column in seen.inputs:
        different = "" if column.distinct is None else number(column.distinct)
        auc = "" if column.auc is None else f"{column.auc:.3f}"
        filled = f"{column.filled:.1%}"
        inputs.add_row(column.name, column.kind, column.source, different, filled, auc, column.task or "")
    console.print(inputs)
    delays = plain_table("delay after the impression, s", "outcomes", "p50", "p90", "p99", "window", "later", ">time")
    for delay in seen.delays:
        quantiles = [number(value, 1) for value in (delay.p50_s, delay.p90_s, delay.p99_s)]
        late, logged = f"{delay.late:.1%}", "logged" if delay.logged else "drawn"
        delays.add_row(delay.task, number(delay.outcomes), *quantiles, f"{delay.window_s:g}", late, logged)
    console.print(delays)
    if seen.sampled < seen.impressions:
        console.print(f"AUC and delays are of {seen.sampled:,} impressions from all over the log", highlight=False)


def _print_estimate(expected: "RunEstimate", impressions: int) -> None:
    console.print(
        f"a backtest of all {impressions:,} impressions: about {_duration(expected.seconds)} and "
        f"{expected.resident_mib:,.0f} MiB for {expected.rows:,} ids\n"
        f"(an estimate from {expected.measured:,} impressions at {expected.impressions_per_s:,.0f} a second)",
        highlight=False,
        soft_wrap=True,
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    return f"{seconds / 60:,.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
