"""``smes replay``: a log into the event log, in time order, patiently."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from simulators.logs.ledger import utc
from simulators.logs.reader import open_log
from simulators.replay import Replayer, ReplayReport
from smes_cli.command_line import StopRequest
from smes_cli.config import Config
from smes_cli.console import RecentRate, console, progress, write_report
from smes_cli.log_tables import print_ledger
from stream.log.open_log import EventLogConfig, open_event_log
from stream.topics import FEEDBACK, IMPRESSIONS


def run_replay(
    config: Config,
    log: Path,
    *,
    limit: int | None,
    max_rejected: float | None,
    report: Path | None,
    should_stop: StopRequest,
) -> ReplayReport:
    """Replay a log until its end or until ``should_stop``; says what was appended, also if it failed.

    Args:
        config: Its schema, event log and replay are used.
        log: A folder or file; see :func:`simulators.logs.reader.open_log`.
        limit: Only the first so many impressions.
        max_rejected: Largest share of unusable rows; None: the schema file's.
        report: Where to write the report, if anywhere.
        should_stop: Asked between two appends, and within every wait.

    Raises:
        LogError: The log cannot be read as its schema file says.
        ValueError: Impressions of a request are to be sent together, and the log has no ids of requests.
        EventLogError, EventLogUnavailable: An append failed. A note on the error says where the replay was.
    """
    schema_file = config.schema_file(log)
    if config.replay.by_request and schema_file.log is not None and schema_file.log.request_id is None:
        raise ValueError(
            f"replay.by_request: schema {schema_file.name!r} names no column for the ids of requests, expected one "
            "(log.request_id), or --one-by-one"
        )
    event_log = open_event_log(_patient(config.event_log, config.replay.outage_timeout_s))
    event_log.set_stop(should_stop)
    try:
        for topic in (IMPRESSIONS, FEEDBACK):
            event_log.ensure_topic(topic, config.event_log.partitions, exact=False)
        with open_log(log, schema_file, limit=limit, max_rejected=max_rejected) as reader:
            ledger = reader.ledger
            print_ledger(ledger)
            reader.check()
            replayer = Replayer(reader, event_log, config.replay)
            try:
                with progress("replay", reader.total) as advance:
                    replayer.run(on_progress=_shown(advance), stop=should_stop)
            except BaseException as error:
                error.add_note(where(replayer.report()))
                raise
            finally:
                write_report(asdict(replayer.report()) | {"log": ledger.to_dict()}, report)
    finally:
        event_log.close()
    result = replayer.report()
    console.print(where(result), highlight=False)
    return result


def where(report: ReplayReport) -> str:
    """What a replay has appended and, if it did not finish, how far it came."""
    appended = (
        f"{report.impressions:,} impressions and {report.feedback:,} feedback events appended in "
        f"{report.elapsed_s:,.1f} s; {report.duplicates:,} exact duplicates dropped"
    )
    if report.finished:
        return appended
    at = "before its first event" if report.event_time_ms is None else f"at event time {utc(report.event_time_ms)}"
    of = f"{report.impressions:,} of {report.total_impressions:,} impressions"
    return f"replay stopped {at}, after {of}: {appended}"


def _patient(config: EventLogConfig, outage_timeout_s: float) -> EventLogConfig:
    """The event log with at least the replay's patience."""
    return replace(
        config,
        redis=replace(config.redis, outage_timeout_s=max(config.redis.outage_timeout_s, outage_timeout_s)),
        kafka=replace(config.kafka, outage_timeout_s=max(config.kafka.outage_timeout_s, outage_timeout_s)),
    )


def _shown(advance: Callable[[int, str], None]) -> Callable[[ReplayReport], None]:
    rate = RecentRate()

    def show(so_far: ReplayReport) -> None:
        advance(so_far.impressions, f"impressions, {rate(so_far.impressions + so_far.feedback):,.0f} events/s")

    return show
