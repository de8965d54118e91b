"""``smes redis``: the Valkey of the wheel, started by hand, for trying things out on one machine."""

from pathlib import Path
from typing import Annotated

import typer

from smes.errors import SmesError
from smes_cli.command_line import stop_signals
from smes_cli.console import console

_LOOK_S = 0.5


def redis_server(
    folder: Annotated[Path, typer.Option("--dir", help="Folder of its data, which it keeps.")] = Path("data/redis"),
    port: Annotated[int, typer.Option(help="TCP port on 127.0.0.1; 0 for any free one.", min=0, max=65535)] = 6379,
) -> None:
    """Run the Valkey that comes with SMES Online until stopped; every write is on disk before it is acknowledged."""
    from smes_cli.demo.local_servers import start_valkey

    with stop_signals() as should_stop, start_valkey(folder, port=port or None) as server:
        console.print(
            f"redis: listening on {server.url}, keeps its data in {folder}; only this machine reaches it",
            highlight=False,
            soft_wrap=True,
        )
        while not should_stop.wait(_LOOK_S):
            if (code := server.process.poll()) is not None:
                raise SmesError(f"redis: the server ended with status {code}; its log is {server.log}")
