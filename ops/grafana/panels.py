"""What a dashboard is made of: rows of panels, panels of queries. See :mod:`ops.grafana.make_dashboards`."""

from dataclasses import dataclass, field

OF = 'job=~"$job", instance=~"$instance"'
_RATE = "[$__rate_interval]"


@dataclass(frozen=True)
class Look:
    """A panel.

    Attributes:
        title: What it shows.
        what: How to read it.
        unit: Grafana's name of the unit.
        queries: Expressions, each with the name of its series.
        over_time: Whether it is a chart; else the newest value, large.
        least: Where the axis begins.
        stacked: Whether the series are parts of a whole.
        wrong_from: From this value on a number has the colour of a fault.
    """

    title: str
    what: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    over_time: bool = True
    least: float | None = None
    stacked: bool = False
    wrong_from: float | None = None


@dataclass(frozen=True)
class Board:
    """A dashboard.

    Attributes:
        uid: Its name in addresses and of its file.
        title: Its title.
        what: What it is for.
        job: Regular expression of the scrape jobs that it can show.
        variables: Further choices at its top: name, label, query.
        rows: Title and panels of each row; numbers first, then charts.
    """

    uid: str
    title: str
    what: str
    job: str
    rows: tuple[tuple[str, tuple[Look, ...]], ...]
    variables: tuple[tuple[str, str, str], ...] = field(default=())


def number(title: str, what: str, unit: str, expr: str, wrong_from: float | None = None) -> Look:
    """The newest value, large."""
    return Look(title, what, unit, ((expr, "{{instance}}"),), over_time=False, wrong_from=wrong_from)


def chart(title: str, what: str, unit: str, *queries: tuple[str, str], least: float | None = 0) -> Look:
    """Lines over time."""
    return Look(title, what, unit, queries, least=least)


def parts(title: str, what: str, unit: str, *queries: tuple[str, str]) -> Look:
    """Parts of a whole over time, one on the other."""
    return Look(title, what, unit, queries, least=0, stacked=True)


def rate(series: str, *by: str) -> str:
    """Per second, summed by instance and these labels."""
    return f"sum by (instance{''.join(f', {label}' for label in by)}) (rate({series}{_RATE}))"


def quantile(q: float, series: str, *by: str) -> str:
    """A quantile of a histogram, by instance and these labels; ``series`` are its buckets."""
    return f"histogram_quantile({q}, {rate(series, 'le', *by)})"


ALERTS = chart(
    "Alerts firing",
    "What each means and what to do: docs/operate/alerts.md, under its name.",
    "none",
    (f'ALERTS{{alertstate="firing", alertname=~"Smes.+", {OF}}}', "{{alertname}} {{instance}}"),
)
"""Alerts of the processes that are shown."""


PROCESSES = (
    "Processes",
    (
        chart(
            "Resident memory",
            "Memory that the process holds. It grows with the id table and with what waits in the join.",
            "bytes",
            (f"process_resident_memory_bytes{{{OF}}}", "{{job}} {{instance}}"),
        ),
        chart(
            "Processor time",
            "Cores in use.",
            "none",
            (f"sum by (job, instance) (rate(process_cpu_seconds_total{{{OF}}}{_RATE}))", "{{job}} {{instance}}"),
        ),
        chart(
            "Open files",
            "Files and connections, and how many there may be.",
            "none",
            (f"process_open_fds{{{OF}}}", "open {{job}} {{instance}}"),
            (f"process_max_fds{{{OF}}}", "limit {{job}} {{instance}}"),
        ),
    ),
)
"""Memory, processor time and open files."""
