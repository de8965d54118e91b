"""Reports as files: one process writes, another reads."""

import json
from pathlib import Path
from typing import Any

from smes.errors import SmesError


def write_report(report: dict[str, Any], path: Path | None, *, indent: int | None = 2) -> None:
    """Write a report as JSON, if a path is given.

    Raises:
        SmesError: The file cannot be written.
    """
    if path is None:
        return
    try:
        path.write_text(json.dumps(report, indent=indent, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise SmesError(f"report {path}: cannot be written: {error.strerror}") from error


def read_report(path: Path, otherwise: str) -> dict[str, Any]:
    """A report that another process wrote.

    Args:
        path: Where.
        otherwise: What that process last said, for the error.

    Raises:
        SmesError: It wrote none.
    """
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SmesError(
            f"report {path.name}: expected one, but its process left none ({error}):\n{otherwise}"
        ) from error
    return report
