"""The ``smes`` command: every subcommand reads the configuration, calls one function and shows its result."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from smes.errors import SmesError, Stopped
from smes_cli.audit import audit
from smes_cli.collection import uncollected
from smes_cli.command_line import (
    EXIT_CHECK_FAILED,
    Limit,
    LogPath,
    MaxRejected,
    ReportPath,
    SchemaName,
    SchemaOfEvents,
    ScorerUrl,
    Seed,
    config_of,
    stop_signals,
    writable,
)
from smes_cli.console import (
    console,
    progress,
    report_table,
    routing_line,
    set_up_logging,
    write_report,
)
from smes_cli.console_command import console_page
from smes_cli.curves import curves
from smes_cli.dead_letters import dead_letters_app
from smes_cli.evaluate import evaluate
from smes_cli.export import export
from smes_cli.features import features_app
from smes_cli.join_command import join
from smes_cli.preloading import torch_preloaded
from smes_cli.redis_server import redis_server
from smes_cli.schema import schema_app
from smes_cli.score_file import score
from smes_cli.snapshots import snapshots_app
from smes_cli.status import status
from smes_cli.task_tables import own_experts_table, print_tasks
from smes_cli.train_command import train

# Each command imports what it runs inside its function: `smes --help` should not wait for all of it, and commands that
# touch no weights should not wait for torch.

app = typer.Typer(
    name="smes",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich" if sys.stdout.isatty() else None,  # a pipe gets plain lines, without boxes
    help="Streaming online learning for multi-task recommendation: an event log is joined, trained on and served, by "
    "weights about a second old. Start with `smes demo`.",
    epilog="Exit codes: 0 done or cleanly stopped · 1 something failed in operation · 2 a wrong argument or "
    "configuration · 3 the run ended but a check of it failed (something was lost, or a request failed) · "
    "130 interrupted.",
)
app.command("audit")(audit)
app.command("console")(console_page)
app.command("curves")(curves)
app.command("evaluate")(evaluate)
app.command("export")(export)
app.command("join")(join)
app.command("redis")(redis_server)
app.command("score")(score)
app.command("status")(status)
app.command("train")(train)
app.add_typer(dead_letters_app, name="dead-letters")
app.add_typer(features_app, name="features")
app.add_typer(schema_app, name="schema")
app.add_typer(snapshots_app, name="snapshots")


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        console.print(f"smes {version('smes-online')}", highlight=False)
        raise typer.Exit


@app.callback()
def common(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option("-c", "--config", help="Configuration file; default: smes.yaml if it is there.")
    ] = None,
    verbose: Annotated[
        int, typer.Option("-v", "--verbose", count=True, help="Also print what is logged for debugging.")
    ] = 0,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and exit.")
    ] = False,
) -> None:
    """Options that every subcommand takes."""
    set_up_logging(-1 if quiet else verbose)
    context.obj = config


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("smes.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented starter configuration."""
    from smes_cli.starter import STARTER

    if path.exists() and not force:
        raise ValueError(f"{path}: exists already, expected a new file (or --force)")
    try:
        path.write_text(STARTER, encoding="utf-8")
    except OSError as error:
        raise SmesError(f"{path}: cannot be written: {error.strerror}") from error
    console.print(f"wrote {path}", highlight=False)


@app.command()
def demo(
    context: typer.Context,
    log: Annotated[Path | None, typer.Option(help="Log to replay; default: a new synthetic one.")] = None,
    schema: SchemaName = None,
    limit: Annotated[int, typer.Option(help="Impressions to replay.", min=1)] = 50_000,
    rate: Annotated[float, typer.Option(help="Impressions and feedback per second of the replay.", min=1)] = 2000.0,
    eventlog: Annotated[Literal["redis", "kafka"], typer.Option(help="Event log to run on.")] = "redis",
    codec: Annotated[Literal["json", "arrow"], typer.Option(help="Wire form of the events.")] = "arrow",
    requests_per_s: Annotated[float, typer.Option(help="Scoring requests per second.", min=0.1)] = 20.0,
    seed: Annotated[int, typer.Option(help="Seed of the synthetic log and of the feedback delays.")] = 0,
    keep: Annotated[Path | None, typer.Option(help="Keep the run's files and logs in this folder.")] = None,
    stay: Annotated[
        bool, typer.Option("--stay", help="When the replay is through, show the report, and run on until Ctrl-C.")
    ] = False,
    report: ReportPath = None,
) -> None:
    """Run everything on this machine: servers, replay, trainer, scorer, requests, console; then the report."""
    from smes_cli.demo.demo import DemoOptions, run_demo

    options = DemoOptions(
        log=log,
        limit=limit,
        rate=rate,
        event_log=eventlog,
        codec=codec,
        seed=seed,
        requests_per_s=requests_per_s,
        keep=keep,
        stay=stay,
    )
    from smes_cli.demo.shown import Shown

    shown = Shown(report)
    with stop_signals() as should_stop:
        result = run_demo(config_of(context, schema), options, should_stop=should_stop, on_replayed=shown.all_of)
    shown.end(result)
    if result.failures:
        raise typer.Exit(EXIT_CHECK_FAILED)


@app.command()
def check(
    context: typer.Context,
    log: LogPath,
    schema: SchemaName = None,
    limit: Limit = None,
    max_rejected: MaxRejected = None,
    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate/--no-estimate",
            help="Run the training loop for about two seconds, to say how much time and memory a backtest takes.",
        ),
    ] = True,
    report: ReportPath = None,
) -> None:
    """Read a log and say what it holds: its ledger, different ids, fill rates, delays, features that tell a label."""
    from smes_cli.check import run_check

    run_check(config_of(context, schema), log, limit=limit, max_rejected=max_rejected, report=report, estimate=estimate)


@app.command()
def backtest(
    context: typer.Context,
    log: LogPath,
    schema: SchemaName = None,
    limit: Limit = None,
    max_rejected: MaxRejected = None,
    seed: Seed = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="A second ranker that learns from the same batches, shown beside the first: linear, shared_bottom, "
            "mmoe, ple, home or smes."
        ),
    ] = None,
    routing: Annotated[
        Path | None,
        typer.Option(
            help="Write the routing over time here, as JSON, which benchmarks.routing plots; and find out, in JSON and "
            "as a table, which tasks would gain from experts of their own.",
            callback=writable,
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Write the trained state into this empty folder: `smes train --from` goes on from it on a live event "
            "log.",
        ),
    ] = None,
    history: Annotated[
        Path | None,
        typer.Option(
            help="Write the metrics over time into this folder, a line for each window of the evaluation: `smes "
            "curves` shows them."
        ),
    ] = None,
    report: ReportPath = None,
) -> None:
    """Join, evaluate and train on a log in one process at full speed, without broker or Redis."""
    from smes.model.config import RANKER_NAMES

    config = config_of(context, schema)
    schema_name = config.schema_file(log).name
    if baseline is not None and baseline not in RANKER_NAMES:
        raise ValueError(f"--baseline {baseline!r}: expected one of {', '.join(RANKER_NAMES)}")
    if seed is None:
        seed = config.replay.seed
    console.print(f"backtest: {log}, schema {schema_name}", highlight=False, soft_wrap=True)
    from smes_cli.backtest import run_backtest
    from smes_cli.log_tables import print_ledger

    with stop_signals() as should_stop:
        result = run_backtest(
            config,
            log,
            limit=limit,
            seed=seed,
            baseline=baseline,
            max_rejected=max_rejected,
            should_stop=should_stop,
            own_experts=routing is not None,
            checkpoint=checkpoint,
            history=history,
        )
    figures = result.figures()
    write_report(figures, report)
    write_report(result.routing | {"own_experts": result.own_experts}, routing, indent=None)
    print_tasks(figures, result.baseline, named=baseline or "")
    console.print(report_table(figures))
    if result.expert_load:
        console.print(result.expert_load, highlight=False)
        console.print(routing_line(figures["routing"]), highlight=False)
    if result.own_experts:
        console.print(own_experts_table(result.own_experts))
    print_ledger(result.ledger)
    memory = ", ".join(f"{mib:,.0f} at {trained:,}" for trained, mib in result.memory_mib)
    console.print(f"resident MiB by impressions trained on: {memory}", highlight=False)


@app.command()
def replay(
    context: typer.Context,
    log: LogPath,
    schema: SchemaName = None,
    speed: Annotated[
        str | None,
        typer.Option(
            help="Event time per wall time: 1 is real time, max is as fast as possible; default: replay.speed of the "
            "configuration."
        ),
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Impressions and feedback per second, instead of --speed.")] = None,
    limit: Limit = None,
    max_rejected: MaxRejected = None,
    seed: Seed = None,
    codec: Annotated[
        Literal["json", "arrow"] | None,
        typer.Option(help="Wire form of the events; default: replay.codec of the configuration."),
    ] = None,
    by_request: Annotated[
        bool | None,
        typer.Option(
            "--by-request/--one-by-one",
            help="Whether what impressions of a request share is sent once, for which the log must have ids of "
            "requests; default: replay.by_request.",
        ),
    ] = None,
    mark: Annotated[
        Path | None,
        typer.Option(
            help="File that says how far the replay has come: a later one with the same file goes on there. What was "
            "appended in the last second before a kill is repeated, and the join counts it as duplicate.",
            callback=writable,
        ),
    ] = None,
    report: ReportPath = None,
) -> None:
    """Replay a log into the event log in time order: impressions, and each feedback after its delay."""
    from smes_cli.replay import run_replay

    config = config_of(context, schema)
    changes: dict[str, Any] = {"rate": rate, "seed": seed, "codec": codec, "by_request": by_request}
    changes["speed"] = _speed(speed)
    if rate is not None and speed is None:
        changes["speed"] = "max"  # whatever the configuration says
    pace = replace(config.replay, **{name: value for name, value in changes.items() if value is not None})
    with stop_signals() as should_stop:
        try:
            run_replay(
                replace(config, replay=pace),
                log,
                limit=limit,
                max_rejected=max_rejected,
                report=report,
                should_stop=should_stop,
                mark=mark,
            )
        except Stopped as stopped:
            console.print(f"replay stopped before its first event: {stopped}", highlight=False)


def _speed(text: str | None) -> float | Literal["max"] | None:
    if text is None or text == "max":
        return text  # type: ignore[return-value] # "max" is the literal
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--speed {text!r}: expected a number or max") from None


@app.command()
def synthesize(
    out: Annotated[Path, typer.Argument(help="Parquet file to write; the truth is written beside it.")],
    impressions: Annotated[int, typer.Option(help="How many impressions.", min=1)] = 1_000_000,
    seed: Annotated[int, typer.Option(help="Seed of the world.")] = 0,
) -> None:
    """Write a synthetic log, and the true probabilities in a file beside it."""
    from simulators.synthetic import synthesize as write_synthetic

    if out.suffix != ".parquet":
        raise ValueError(f"{out}: expected a file that ends in .parquet, as `smes synthesize` writes it")
    with progress("synthesize", impressions) as advance:
        summary = write_synthetic(out, impressions, seed, on_progress=lambda written: advance(written))
    rates = ", ".join(f"{task} {count / summary.impressions:.2%}" for task, count in summary.positives.items())
    console.print(
        f"{summary.impressions:,} impressions of {summary.users:,} users and {summary.items:,} items over "
        f"{summary.span_s:,.0f} s in {summary.log}, truth in {summary.truth}\npositives: {rates}",
        highlight=False,
    )


@app.command()
def serve(
    context: typer.Context,
    schema: SchemaOfEvents = None,
    port: Annotated[int | None, typer.Option(help="TCP port; 0 for any free one.", min=0, max=65535)] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes that answer, with one copy of the table for all; default: scorer.processes.", min=1
        ),
    ] = None,
) -> None:
    """Score over HTTP until stopped, always with the newest snapshot."""
    with uncollected(), torch_preloaded():
        config = config_of(context, schema)
        schema_file = config.schema_file()
        console.print(f"serve: schema {schema_file.name}", highlight=False)
        scorer = config.scorer if port is None else replace(config.scorer, port=port)
        scorer = scorer if workers is None else replace(scorer, processes=workers)
        run_scorer: Callable[..., None]
        if scorer.processes == 1:
            from smes_scorer import service

            run_scorer = service.serve
        else:
            from smes_scorer.processes import supervisor

            run_scorer = supervisor.serve_by_processes

    run_scorer(
        scorer,
        schema_file.schema,
        redis_url=config.feature_store.redis_url,
        redis_access=config.feature_store.redis_access,
        namespace=config.feature_store.namespace,
        signing=config.feature_store.signing,
        chunks=config.feature_store.chunks,
        renamed=schema_file.renamed.features,
        on_listening=lambda url: console.print(f"scorer: listening on {url}", highlight=False),
    )


@app.command()
def freshness(
    context: typer.Context,
    url: ScorerUrl = None,
    report: ReportPath = None,
) -> None:
    """Ask a running scorer how fresh its answers are, and print which stage takes how long."""
    from smes_cli.freshness import run_freshness

    run_freshness(config_of(context), url, report)
