"""``smes replay``: a log into the event log, in time order, patiently."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from simulators.logs.ledger import utc
from simulators.logs.reader import LogReader, open_log
from simulators.replay import Replayer, ReplayReport
from simulators.replay_mark import Mark, MarkFile
from smes_cli.command_line import StopRequest
from smes_cli.config import Config
from smes_cli.console import RecentRate, console, progress, write_report
from smes_cli.log_tables import print_ledger
from stream.log.event_log import EventLog, TopicPartition
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
    mark: Path | None = None,
) -> ReplayReport:
    """Replay a log until its end or until ``should_stop``; says what was appended, also if it failed.

    Args:
        config: Its schema, event log and replay are used.
        log: A folder or file; see :func:`simulators.logs.reader.open_log`.
        limit: Only the first so many impressions.
        max_rejected: Largest share of unusable rows; None: the schema file's.
        report: Where to write the report, if anywhere.
        should_stop: Asked between two appends, and within every wait.
        mark: File that says how far an earlier replay came, and then how far this one came; None: it begins at the
            log's beginning.

    Raises:
        LogError: The log cannot be read as its schema file says.
        ValueError: Impressions of a request are to be sent together, and the log has no ids of requests; or ``mark`` is
            of another replay.
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
            file = None if mark is None else MarkFile(mark, _what(config, reader, event_log))
            begin = (0, 0) if file is None else _begin(file.read())
            replayer = Replayer(reader, event_log, config.replay, begin=begin)
            try:
                with progress("replay", reader.total) as advance:
                    shown = _shown(advance, sum(begin))

                    def on_progress(so_far: ReplayReport) -> None:
                        shown(so_far)
                        if file is not None:
                            file.write_if_due(so_far)

                    replayer.run(on_progress=on_progress, stop=should_stop)
            except BaseException as error:
                error.add_note(where(replayer.report()))
                raise
            finally:
                if file is not None:
                    file.write(replayer.report())
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


def _what(config: Config, reader: LogReader, event_log: EventLog) -> dict[str, str]:
    """What decides the order of the events, and which topics they are appended to.

    The log itself by what is counted in it: it may have another path in another container.
    """
    replay, ledger = config.replay, reader.ledger
    times = f"from {ledger.first_event_ms} to {ledger.last_event_ms} ms"
    topics = {topic: event_log.incarnations(topic) for topic in (IMPRESSIONS, FEEDBACK)}
    return {
        "schema": reader.schema.hash,
        "impressions": str(reader.total),
        "log": f"{ledger.rows} rows {times}, {ledger.users} users, {ledger.items} items",
        "seed": str(replay.seed),
        "late_share": str(replay.late_share),
        **{f"topic {topic}": incarnation_of[TopicPartition(topic, 0)] for topic, incarnation_of in topics.items()},
    }


def _begin(mark: Mark) -> tuple[int, int]:
    """Impressions and feedback before the place to go on from, which is said."""
    if mark.finished:
        console.print("this log was replayed to its end before: nothing is left to append", highlight=False)
    elif mark.impressions or mark.feedback:
        console.print(
            f"going on after {mark.impressions:,} impressions and {mark.feedback:,} feedback events", highlight=False
        )
    return mark.impressions, mark.feedback


def _patient(config: EventLogConfig, outage_timeout_s: float) -> EventLogConfig:
    """The event log with at least the replay's patience."""
    return replace(
        config,
        redis=replace(config.redis, outage_timeout_s=max(config.redis.outage_timeout_s, outage_timeout_s)),
        kafka=replace(config.kafka, outage_timeout_s=max(config.kafka.outage_timeout_s, outage_timeout_s)),
    )


def _shown(advance: Callable[[int, str], None], before: int) -> Callable[[ReplayReport], None]:
    rate = RecentRate()

    def show(so_far: ReplayReport) -> None:
        events = so_far.impressions + so_far.feedback - before
        advance(so_far.impressions, f"impressions, {rate(events):,.0f} events/s")

    return show
