"""The run of a demo: servers, trainer, scorer and replay as processes, requests to the scorer, and the report."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import redis

from simulators.synthetic import synthesize
from smes_cli.compile_loops import compile_loops
from smes_cli.config import Config
from smes_cli.console import console, read_report, write_report
from smes_cli.demo.addresses import Addresses, live_report, scorer_stats
from smes_cli.demo.local_servers import start_kafka, start_valkey
from smes_cli.demo.processes import log_tail, stop, stop_all
from smes_cli.demo.requests import RequestLoop, RequestTally
from smes_cli.demo.workers import Workers
from smes_cli.features import load_features
from smes_io.clock import wait_until
from smes_io.redis_access import RedisAccess, key_prefix
from smes_io.redis_client import connect
from stream.log.kafka_config import KafkaAccess
from stream.log.open_log import open_event_log
from stream.topics import FEEDBACK, IMPRESSIONS
from trainer.config import HistoryConfig, HttpConfig
from trainer.report import conservation_errors

_SETTLE_S = 15.0
_POINTS, _FEWEST_EXAMPLES, _POINT_S = 50, 200, 10.0


@dataclass(frozen=True)
class DemoOptions:
    """Options of the demo.

    Attributes:
        log: Log to replay. None: a synthetic log is made.
        limit: Number of impressions to replay.
        rate: Events per second of the replay.
        event_log: ``redis`` or ``kafka``.
        codec: Wire form of the events.
        seed: Seed of the synthetic log and of the feedback delays.
        requests_per_s: Scoring requests per second.
        items_per_request: Items that each request ranks.
        keep: Folder for the run's configuration, logs, data, addresses and report. None: a temporary one, removed at
            the end.
        stay: Whether everything stays up when the replay is through, until a stop is asked for.
    """

    log: Path | None = None
    limit: int = 50_000
    rate: float = 2000.0
    event_log: str = "redis"
    codec: str = "arrow"
    seed: int = 0
    requests_per_s: float = 20.0
    items_per_request: int = 50
    keep: Path | None = None
    stay: bool = False


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Result of a demo.

    Attributes:
        report: The report in its documented form.
        failures: Failed checks, in words; empty if everything is well.
    """

    report: dict[str, Any]
    failures: list[str]


def run_demo(
    config: Config,
    options: DemoOptions,
    *,
    should_stop: Callable[[], bool],
    on_replayed: Callable[[DemoResult], None] = lambda result: None,
) -> DemoResult:
    """Start all processes, replay a log while the scorer is asked, stop all processes, and check the report.

    Args:
        config: Of all processes; servers and ports are those of this run.
        options: Of the run.
        should_stop: Asked every half second.
        on_replayed: Called with what is known when the replay is through and everything stays up.

    Raises:
        SmesError: A process did not start, or ended too early. The message ends with the process's own output.
        ValueError: The log has no schema, or an option is wrong.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(_run_folder(options.keep))
        log, schema_name = _open_log(config, options, folder)
        config = replace(_with_servers(config, options, folder, stack), schema=schema_name)
        loaded = _prepare(config, log)
        workers = Workers(config, folder, stack)
        trainer = workers.start("train", "--drain", "--report", str(folder / "train.json"))
        scorer = workers.start("serve")
        url = workers.printed_url("serve", scorer)
        replay = workers.start("replay", str(log), "--report", str(folder / "replay.json"), *_replay_arguments(options))
        addresses = Addresses(url, workers.printed_url("train", trainer).removesuffix("/metrics"))
        workers.write(addresses.put_into(config))  # `smes -c DIR/smes.yaml status` asks this scorer
        page = workers.start("console", *addresses.arguments(), "--history", str(config.trainer.history.directory))
        address = workers.printed_url("console", page)
        addresses.write(folder / "addresses.json", console=address)
        console.print(f"console: {address}", highlight=False, soft_wrap=True)
        workers.wait_ready(url, scorer, trainer)
        requests = RequestLoop(
            url,
            np.array(loaded["users_sample"]),
            np.array(loaded["items_sample"]),
            [task.name for task in config.schema_file().schema.tasks],
            per_s=options.requests_per_s,
            items_per_request=options.items_per_request,
        )
        requests.start()
        running = {"train": trainer, "serve": scorer, "console": page}
        replayed = workers.watch(url, replay, running, should_stop)
        if options.stay and not should_stop():
            report = live_report(addresses.trainer, replayed, should_stop)
            if report is not None:
                _await_version(url, report)
                on_replayed(_result(report, replayed, url, requests.so_far(), options.keep))
            console.print(f"everything stays up until Ctrl-C: {address}", highlight=False, soft_wrap=True)
            workers.stay(running, should_stop)
        stop(trainer, timeout_s=120)
        report = read_report(folder / "train.json", log_tail(workers.log_of("train")))
        _await_version(url, report)
        result = _result(report, replayed, url, requests.stop(), options.keep)
        stop_all([scorer, page], timeout_s=20)
    return result


def _result(
    report: dict[str, Any], replayed: dict[str, Any], url: str, tally: RequestTally, keep: Path | None
) -> DemoResult:
    """The trainer's report with what scorer and replay know, checked."""
    _add_scorer(report, scorer_stats(url), tally)
    report["log"] = replayed["log"]
    write_report(report, None if keep is None else keep / "report.json")
    return DemoResult(report, _failures(report, replayed, tally.last_error))


@contextmanager
def _run_folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
            # What an earlier run left, such as its checkpoints, is of another event log.
            raise ValueError(f"--keep {keep}: expected a new or an empty folder, got one with files in it")
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()
        return
    folder = Path(tempfile.mkdtemp(prefix="smes-demo-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _open_log(config: Config, options: DemoOptions, folder: Path) -> tuple[Path, str]:
    """The log, made first unless one is given, and the schema's name or path for processes in another folder."""
    if options.log is None:
        log = folder / "world.parquet"
        with console.status(f"making a synthetic log of {options.limit:,} impressions"):
            synthesize(log, options.limit, options.seed)
        return log, "synthetic"
    log = options.log.resolve()
    name = config.schema_name(log)
    return log, str(Path(name).resolve()) if Path(name).exists() else name


def _with_servers(config: Config, options: DemoOptions, folder: Path, stack: ExitStack) -> Config:
    """The configuration with the servers of this run. They are started unless the environment names running ones.

    They let everybody in, and so does the scorer, which is for this run alone.
    """
    namespace = f"demo-{os.getpid()}-{int(time.time())}"
    given = os.environ.get("REDIS_URL")
    if given:
        redis_url = given
        stack.callback(_remove_keys, redis_url, namespace)
    else:
        redis_url = stack.enter_context(start_valkey(folder / "valkey")).url
    place: dict[str, Any] = {"redis_url": redis_url, "redis_access": RedisAccess(), "namespace": namespace}
    event_log = replace(config.event_log, **place, kafka_access=KafkaAccess(), kind="redis")
    if options.event_log == "kafka":
        event_log = replace(event_log, kind="kafka", kafka_bootstrap=_kafka(folder, stack))
    trainer = config.trainer
    return replace(
        config,
        event_log=event_log,
        feature_store=replace(config.feature_store, **place),
        # One core for training and one for everything else; any free port; enough time for the features.
        trainer=replace(
            trainer,
            threads=trainer.threads or 1,
            checkpoint=replace(trainer.checkpoint, directory=folder / "checkpoints"),
            http=HttpConfig(port=0),
            history=_history(trainer.history, folder, options.limit),
        ),
        scorer=replace(config.scorer, port=0, entity_timeout_ms=1000, tokens=None),
    )


def _history(config: HistoryConfig, folder: Path, limit: int) -> HistoryConfig:
    """The run's metrics over time: a learning curve of some fifty points, unless it is configured."""
    if replace(config, directory=None) == HistoryConfig():
        config = replace(config, every_examples=max(_FEWEST_EXAMPLES, limit // _POINTS), every_s=_POINT_S)
    return replace(config, directory=folder / "history")


def _kafka(folder: Path, stack: ExitStack) -> str:
    if bootstrap := os.environ.get("KAFKA_BOOTSTRAP"):
        return bootstrap
    home = os.environ.get("KAFKA_HOME")
    if home is None:
        raise ValueError(
            "--eventlog kafka: expected KAFKA_BOOTSTRAP (brokers that run) or KAFKA_HOME (a Kafka distribution)"
        )
    with console.status("starting Apache Kafka"):
        return stack.enter_context(start_kafka(Path(home), folder / "kafka")).bootstrap


def _prepare(config: Config, log: Path) -> dict[str, Any]:
    """Create the topics, compile, and load the features, so that no worker has to wait for another.

    Returns:
        As :func:`smes_cli.features.load_features`.
    """
    event_log = open_event_log(config.event_log)
    try:
        for topic in (IMPRESSIONS, FEEDBACK):
            event_log.ensure_topic(topic, config.event_log.partitions)
    finally:
        event_log.close()
    with console.status("compiling (the first time only) and loading features"):
        compile_loops(config, config.schema_file().schema)  # here once, not in trainer and scorer at the same time
        loaded = load_features(config, log)
    console.print(f"features of {loaded['user']:,} users and {loaded['item']:,} items in Redis", highlight=False)
    return loaded


def _remove_keys(redis_url: str, namespace: str) -> None:
    """Remove the run's keys from a Redis server that is not its own."""
    client = connect(redis_url, 10.0)
    try:
        for key in client.scan_iter(match=f"{key_prefix(namespace)}:*", count=1000):
            client.unlink(key)
    except redis.RedisError as error:
        console.print(f"keys under {namespace}: could not be removed: {error}")
    finally:
        client.close()


def _replay_arguments(options: DemoOptions) -> list[str]:
    arguments = ["--limit", str(options.limit), "--seed", str(options.seed), "--codec", options.codec]
    return [*arguments, "--rate", str(options.rate)]


def _await_version(url: str, report: dict[str, Any]) -> None:
    """Wait until the last version answers, so that the freshness of the last feedback is measured too."""

    def is_served() -> bool:
        stats = scorer_stats(url)
        return bool((stats["lineage"], stats["version"]) == (report["lineage"], report["version"]))

    if wait_until(is_served, timeout_s=_SETTLE_S):
        time.sleep(0.3)  # a few answers by it


def _add_scorer(report: dict[str, Any], stats: dict[str, Any], tally: RequestTally) -> None:
    """Fill in the report's figures that only the scorer and its callers know."""
    report["freshness_ms"] = {key: stats["freshness_ms"][key] for key in ("p50", "p99")}
    report["freshness_stages_ms"] = stats["freshness_stages_ms"]
    report["snapshots"]["served"] = stats["versions_answered"]
    report["scorer"] = {
        "requests": tally.requests,
        "errors": tally.errors,
        "mixed_versions": tally.mixed_versions,
        "p50_ms": tally.quantile_ms(0.5),
        "p99_ms": tally.quantile_ms(0.99),
    }


def _failures(report: dict[str, Any], replayed: dict[str, Any], last_error: str) -> list[str]:
    failures = conservation_errors(report)
    for ledger, total, sent in (("events", "impressions", "impressions"), ("feedback", "received", "feedback")):
        if report[ledger][total] < replayed[sent]:
            failures.append(f"{sent}: {replayed[sent]} were appended to the log, {report[ledger][total]} were read")
    scorer = report["scorer"]
    if scorer["errors"]:
        failures.append(
            f"scorer: {scorer['errors']} of {scorer['requests']} requests failed, the last with {last_error}"
        )
    if scorer["mixed_versions"]:
        failures.append(f"scorer: {scorer['mixed_versions']} answers mixed versions")
    if not scorer["requests"]:
        failures.append("scorer: no request was made")
    return failures
