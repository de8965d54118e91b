"""``smes schema``: commands about schema files."""

import typer

from smes_cli.schema_diff import diff
from smes_cli.schema_infer import infer

schema_app = typer.Typer(no_args_is_help=True, help="Schema files.")
schema_app.command("diff")(diff)
schema_app.command("infer")(infer)
