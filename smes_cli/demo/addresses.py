"""Where the parts of a running demo are found, and what its trainer says while it runs."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from smes.errors import SmesError
from smes_cli.config import Config
from smes_cli.console import errors

_WITHIN_S = 60.0
_POLL_S = 0.2
_SETTLED_S = 2.5  # the trainer's copy of the report may be a second old, and a cut comes a second after the last step


@dataclass(frozen=True, slots=True)
class Addresses:
    """Base URLs of scorer and trainer."""

    scorer: str
    trainer: str

    def arguments(self) -> tuple[str, ...]:
        """The options by which ``smes console`` finds both; it takes a free port itself."""
        return ("--scorer", self.scorer, "--trainer", self.trainer, "--host", "127.0.0.1", "--port", "0")

    def put_into(self, config: Config) -> Config:
        """The configuration with the ports that scorer and trainer listen on."""
        scorer, trainer = (urlsplit(url).port for url in (self.scorer, self.trainer))
        assert scorer is not None, "a URL that a scorer printed has its port"
        assert trainer is not None, "a URL that a trainer printed has its port"
        http = replace(config.trainer.http, port=trainer)
        return replace(config, scorer=replace(config.scorer, port=scorer), trainer=replace(config.trainer, http=http))

    def write(self, path: Path, *, console: str) -> None:
        """Write them as JSON, with the console's address, which may end with its token: for this user alone."""
        path.touch(mode=0o600)
        path.chmod(0o600)
        path.write_text(json.dumps({"console": console, "scorer": self.scorer, "trainer": self.trainer}) + "\n")


def scorer_stats(scorer: str) -> dict[str, Any]:
    """The scorer's ``/v1/stats``.

    Raises:
        SmesError: It gave no answer.
    """
    try:
        return dict(httpx.get(f"{scorer}/v1/stats", timeout=10).raise_for_status().json())
    except httpx.HTTPError as error:
        raise SmesError(f"scorer at {scorer}: no answer: {error}") from error


def live_report(trainer: str, replayed: dict[str, Any], should_stop: Callable[[], bool]) -> dict[str, Any] | None:
    """The report of a trainer that runs, once it has read everything that was replayed and nothing changes any more.

    Args:
        trainer: Its base URL.
        replayed: How many ``impressions`` and how much ``feedback`` were appended.
        should_stop: Ends the wait.

    Returns:
        The report; None if it did not come in time, which is printed, or a stop was asked for.
    """
    deadline_s, why = time.monotonic() + _WITHIN_S, "it has not read all events"
    before, since_s = None, time.monotonic()
    with httpx.Client(timeout=10) as client:
        while not should_stop() and time.monotonic() < deadline_s:
            try:
                report = client.get(f"{trainer}/v1/stats").raise_for_status().json()["report"]
            except (httpx.HTTPError, ValueError, KeyError) as error:
                why = f"{type(error).__name__}: {error}"
            else:
                now = None if report is None else {**report, "throughput": None}  # which falls as time goes on
                if now != before:
                    before, since_s = now, time.monotonic()
                elif report is not None and _read_all(report, replayed) and time.monotonic() - since_s > _SETTLED_S:
                    return dict(report)
            time.sleep(_POLL_S)
    if not should_stop():
        errors.print(f"trainer: no report within {_WITHIN_S:g} s: {why}", style="bold red", highlight=False)
    return None


def _read_all(report: dict[str, Any], replayed: dict[str, Any]) -> bool:
    impressions, feedback = report["events"]["impressions"], report["feedback"]["received"]
    return bool(impressions >= replayed["impressions"] and feedback >= replayed["feedback"])
