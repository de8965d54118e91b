"""Entry point: run the command, and turn errors into one line and an exit code."""

import sys

from smes.errors import SmesError
from smes_cli.app import app
from smes_cli.console import errors

EXIT_FAILED, EXIT_USAGE = 1, 2


def main() -> None:
    """Run ``smes`` and exit."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run ``smes`` with the given arguments; returns its exit code (see ``smes --help``)."""
    try:
        # Typer reports wrong arguments (status 2) and interrupts (status 130) itself. It always raises SystemExit.
        app(args=arguments, prog_name="smes")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except SmesError as error:
        errors.print(f"smes: {error}", highlight=False, markup=False, soft_wrap=True)
        return EXIT_FAILED
    except ValueError as error:
        errors.print(f"smes: {error}", highlight=False, markup=False, soft_wrap=True)
        return EXIT_USAGE
    return 0


if __name__ == "__main__":
    main()
