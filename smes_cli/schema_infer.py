"""``smes schema infer``: propose a commented schema file for a log."""

from pathlib import Path
from typing import Annotated

import typer

from smes.errors import SmesError
from smes_cli.console import console, progress


def infer(
    log: Annotated[Path, typer.Argument(help="The folder with the log and its feature tables, or the log's own file.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the schema file here; default: print it.", dir_okay=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    user: Annotated[str | None, typer.Option("--user", help="The log's column of user ids.")] = None,
    item: Annotated[str | None, typer.Option("--item", help="The log's column of item ids.")] = None,
    time: Annotated[str | None, typer.Option("--time", help="The log's column of times of impressions.")] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", help="A column of the log that is an outcome; repeat it for more.")
    ] = None,
) -> None:
    """Propose a commented schema file for a log, from a bounded look at its files. What is unsure is marked with ?."""
    if out is not None and out.exists() and not force:
        raise ValueError(f"--out {out}: exists already, expected a new file (or --force)")
    from simulators.logs.infer import propose
    from simulators.logs.infer_roles import Hints
    from simulators.logs.infer_text import schema_text, unsure_lines

    hints = Hints(user=user, item=item, time=time, labels=tuple(label or ()))
    with progress("tables looked at", None) as advance:
        proposal = propose(log, hints, advance)
    text = schema_text(proposal)
    if out is None:
        console.print(text, end="", highlight=False, soft_wrap=True)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SmesError(f"--out {out}: cannot be written: {error.strerror}") from error
    console.print(
        f"wrote {out}: tasks {len(proposal.roles.labels)}, features {len(proposal.features)}, places marked with ? "
        f"{unsure_lines(text)}\nnext: smes check {log} --schema {out}",
        highlight=False,
        soft_wrap=True,
    )
