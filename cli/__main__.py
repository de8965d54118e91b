"""Entry point: runs the command and turns errors into one line and an exit code."""

import sys

import click
from click.exceptions import Abort

from cli.app import app
from cli.console import errors
from smes.errors import SmesError

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def main() -> None:
    """Run ``smes`` and exit."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run ``smes`` with arguments; its exit code (see ``smes --help``)."""
    try:
        code = app(args=arguments, prog_name="smes", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return EXIT_USAGE
    except (KeyboardInterrupt, Abort):
        return EXIT_INTERRUPTED
    except SmesError as error:
        errors.print(f"smes: {error}", highlight=False, markup=False, soft_wrap=True)
        return EXIT_FAILED
    except ValueError as error:
        errors.print(f"smes: {error}", highlight=False, markup=False, soft_wrap=True)
        return EXIT_USAGE
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    main()
