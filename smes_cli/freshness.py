"""``smes freshness``: what freshness is made of, stage by stage, so that one sees what to change."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import httpx
from rich.table import Table

from smes.errors import SmesError
from smes_cli.config import Config
from smes_cli.console import console, number, write_report
from smes_io.bearer import one_token
from smes_scorer.freshness_stages import DEPENDS_ON

_TIMEOUT_S = 10.0


def run_freshness(config: Config, url: str | None, report: Path | None) -> dict[str, Any]:
    """Ask a scorer for its freshness and print it; the figures, which are also written to ``report``.

    Args:
        config: Names the scorer's host and port, and where its tokens are.
        url: Base URL of the scorer; None: the configured one.
        report: Where to write the figures as JSON, if anywhere.

    Raises:
        SmesError: The scorer gave no answer, or one that has no freshness; or its tokens cannot be read.
    """
    url, stats = ask_scorer(config, url, "/v1/stats")
    try:
        figures = {key: stats[key] for key in ("freshness_ms", "freshness_stages_ms")}
    except KeyError as error:
        raise SmesError(f"scorer {url}: /v1/stats: expected the statistics of `smes serve`: {error!r}") from error
    write_report(figures, report)
    if not figures["freshness_ms"]["count"]:
        console.print(
            f"scorer {url} has not counted any feedback yet: it counts what was trained on after its first snapshot, "
            "from the first answer by a version that knows it",
            highlight=False,
        )
        return figures
    console.print(f"{figures['freshness_ms']['count']:,} feedback events, answered by {url}", highlight=False)
    console.print(freshness_table(figures))
    return figures


def ask_scorer(config: Config, url: str | None, path: str, *, also: Collection[int] = ()) -> tuple[str, dict[str, Any]]:
    """The scorer's URL, and the JSON object that it answers at a path.

    Args:
        config: Names the scorer's host and port, and where its tokens are.
        url: Base URL of the scorer; None: the configured one.
        path: Begins with a slash.
        also: Further statuses whose answer counts, beside 200.

    Raises:
        SmesError: It gave no answer, or another one; or its tokens cannot be read.
    """
    url = (url or _configured(config)).rstrip("/")
    headers = {} if config.scorer.tokens is None else {"authorization": f"Bearer {one_token(config.scorer.tokens)}"}
    try:
        response = httpx.get(f"{url}{path}", headers=headers, timeout=_TIMEOUT_S)
        if response.status_code not in also:
            response.raise_for_status()
        answer = response.json()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise SmesError(f"scorer {url}: no answer: {error}; expected a running `smes serve`") from error
    except ValueError as error:
        raise SmesError(f"scorer {url}: {path}: no JSON, expected a running `smes serve`") from error
    if not isinstance(answer, dict):
        raise SmesError(f"scorer {url}: {path}: expected an object of `smes serve`")
    return url, answer


def freshness_table(figures: dict[str, Any]) -> Table:
    """Freshness and its stages in milliseconds. The means add up; medians and percentiles do not.

    Args:
        figures: ``freshness_ms`` and ``freshness_stages_ms``, as in ``/v1/stats`` and in the demo's report.
    """
    table = Table(box=None, title="freshness: from a feedback event's arrival to the first answer that knows it")
    table.title_justify = "left"
    table.add_column("stage", overflow="fold")
    for name in ("p50 ms", "p99 ms", "mean ms", "of the mean"):
        table.add_column(name, justify="right")
    table.add_column("depends on", overflow="fold")
    stages = figures["freshness_stages_ms"]
    total_ms = sum(stages[stage]["mean"] or 0.0 for stage in DEPENDS_ON)
    for stage, (what, depends_on) in DEPENDS_ON.items():
        spans = stages[stage]
        share = f"{(spans['mean'] or 0.0) / total_ms:.0%}" if total_ms else "–"
        table.add_row(what, *(number(spans[key], 0) for key in ("p50", "p99", "mean")), share, depends_on)
    whole = figures["freshness_ms"]
    table.add_row("freshness", number(whole["p50"], 0), number(whole["p99"], 0), number(total_ms, 0), "", style="bold")
    return table


def _configured(config: Config) -> str:
    """The scorer's URL, seen from its own machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.scorer.host, config.scorer.host)  # noqa: S104 - no binding
    return f"http://[{host}]:{config.scorer.port}" if ":" in host else f"http://{host}:{config.scorer.port}"
