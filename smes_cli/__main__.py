"""Entry point: run the command, and turn errors into one line and an exit code."""

import gc
import logging
import sys
import traceback

from smes.errors import WRONG_INPUT, SmesError
from smes_cli.app import app
from smes_cli.console import errors
from smes_cli.loop_cache import loop_cache

EXIT_FAILED, EXIT_USAGE = 1, 2


def main() -> None:
    """Run ``smes`` and exit."""
    try:
        with loop_cache():
            code = run(sys.argv[1:])
    except SmesError as error:
        _print(error)
        code = EXIT_FAILED
    if "duckdb" not in sys.modules:  # which would print that its objects were not collected
        gc.freeze()  # or the interpreter's last collection would look at every object of the libraries: seconds
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run ``smes`` with the given arguments; returns its exit code (see ``smes --help``)."""
    try:
        # Typer reports wrong arguments (status 2) and interrupts (status 130) itself. It always raises SystemExit.
        app(args=arguments, prog_name="smes")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except WRONG_INPUT as error:
        _print(error)
        return EXIT_USAGE
    except (SmesError, OSError) as error:  # OSError: a full disk, a folder without rights
        _print(error)
        return EXIT_FAILED
    except MemoryError as error:
        error.add_note("expected more memory, or a configuration that asks for less")
        _print(error)
        return EXIT_FAILED
    return 0


def _print(error: Exception) -> None:
    """Print an error, and what was noted on its way, as one line; where it came from is for ``--verbose``."""
    # Places alone: the messages of its causes may quote a configuration, passwords included.
    places = [f"{place.filename}:{place.lineno} {place.name}" for place in traceback.extract_tb(error.__traceback__)]
    logging.getLogger(__name__).debug("%s came from\n  %s", type(error).__name__, "\n  ".join(places))
    said = str(error) or type(error).__name__  # Python's own lack of memory says nothing
    errors.print("smes: " + "; ".join([said, *getattr(error, "__notes__", [])]), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
