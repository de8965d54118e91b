"""``smes console``: the page in the browser."""

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smes_cli.command_line import SchemaOfEvents, config_of
from smes_cli.console import console

if TYPE_CHECKING:
    from smes_cli.config import Config
    from smes_console.sources import Places

_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 - no binding
_NAMED = re.compile(r"([^/=]+)=(.+)")

_logger = logging.getLogger(__name__)


def console_page(
    context: typer.Context,
    schema: SchemaOfEvents = None,
    trainer: Annotated[
        str | None, typer.Option("--trainer", help="Base URL of the trainer; default: as configured.")
    ] = None,
    scorer: Annotated[
        str | None, typer.Option("--scorer", help="Base URL of the scorer; default: as configured.")
    ] = None,
    history: Annotated[
        Path | None,
        typer.Option("--history", help="Folder of a run's metrics over time, also of a run that has ended."),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            "--baseline", help="Folder of another run's metrics over time, DIR or NAME=DIR; may be given several times."
        ),
    ] = None,
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="TCP port; 0 for any free one.", min=0, max=65535)] = None,
) -> None:
    """Show what a deployment does, in the browser, until stopped; acting on it needs the token of the address."""
    config = config_of(context, schema)
    given: dict[str, Any] = {
        "trainer_url": trainer,
        "scorer_url": scorer,
        "history": history,
        "baseline": tuple(baseline) if baseline else None,
        "host": host,
        "port": port,
    }
    config = replace(config, console=replace(config.console, **{k: v for k, v in given.items() if v is not None}))
    from smes_console.service import serve

    def say(url: str, token: str | None) -> None:
        address = url if token is None else f"{url}/#token={token}"
        console.print(f"console: listening on {address}", highlight=False, soft_wrap=True)

    serve(config.console, places_of(config), on_listening=say)


def places_of(config: "Config") -> "Places":
    """Where the console finds everything, from the whole configuration.

    Raises:
        ValueError: A baseline is no folder, or two have the same name.
    """
    from smes_cli.dead_letters import replayer_of
    from smes_console.sources import Places

    own, http = config.console, config.trainer.http
    trainer_url = own.trainer_url or (_url(http.host, http.port) if http.port else None)
    return Places(
        event_log=config.event_log,
        feature_store=config.feature_store,
        schema=config.schema_file() if config.schema is not None else None,
        trainer_url=trainer_url,
        scorer_url=own.scorer_url or (_url(config.scorer.host, config.scorer.port) if config.scorer.port else None),
        trainer_token=own.trainer_token or http.tokens,
        scorer_token=own.scorer_token or config.scorer.tokens,
        history=own.history or config.trainer.history.directory,
        baselines=_baselines(own.baseline),
        snapshot_interval_s=config.trainer.snapshot_interval_s,
        replayer=lambda log, adopt_schema: replayer_of(config, log, adopt_schema=adopt_schema),
    )


def _url(host: str, port: int) -> str:
    """A server's URL, seen from its own machine."""
    host = _EVERYWHERE.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _baselines(given: tuple[str, ...]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in given:
        named = _NAMED.fullmatch(text)
        path = Path(named[2] if named else text)
        name = named[1] if named else path.resolve().name
        if not path.is_dir():
            raise ValueError(f"--baseline {text}: no such folder, expected one of trainer.history.directory")
        if name in found:
            raise ValueError(f"--baseline {text}: a second one of the name {name!r}, expected NAME=DIR")
        found[name] = path
    return found
