"""Find the files of a log."""

from dataclasses import dataclass
from pathlib import Path

from smes.errors import LogError
from smes_io.log_spec import LogSpec, SideTable

EXTENSIONS = (".csv", ".parquet")
_MOST_LISTED = 12


@dataclass(frozen=True)
class LogFiles:
    """Absolute paths. Each list is in reading order, and all its files have one extension."""

    log: list[str]
    user: list[str]
    item: list[str]


def find_files(path: Path, spec: LogSpec) -> LogFiles:
    """Find the log's files and its feature tables.

    Args:
        path: The log's folder, or a log that is a single file.
        spec: Patterns of the files.

    Raises:
        LogError: There is no such file or folder, a pattern matches nothing, or a file is neither CSV nor Parquet.
    """
    if not path.exists():
        raise LogError(f"{path}: no such file or folder, expected a log of impressions")
    if path.is_dir():
        folder, log = path, _match(path, spec.files, "log.files")
    else:
        folder, log = path.parent, [path]
    return LogFiles(
        log=_checked(log),
        user=_checked(_side_files(folder, spec.user_features, "log.user_features.files")),
        item=_checked(_side_files(folder, spec.item_features, "log.item_features.files")),
    )


def _side_files(folder: Path, table: SideTable | None, key: str) -> list[Path]:
    return [] if table is None else _match(folder, table.files, key)


def _match(folder: Path, patterns: tuple[str, ...], key: str) -> list[Path]:
    found = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    if not found:
        there = sorted(file.name for file in folder.iterdir())
        listed = ", ".join(there[:_MOST_LISTED]) + (", …" if len(there) > _MOST_LISTED else "")
        raise LogError(f"{folder}: expected a file named {' or '.join(patterns)} ({key}), found {listed or 'nothing'}")
    return found


def _checked(files: list[Path]) -> list[str]:
    extensions = {file.suffix.lower() for file in files}
    for file in files:
        if file.suffix.lower() not in EXTENSIONS:
            raise LogError(f"{file}: expected a file that ends in .csv or .parquet")
    if len(extensions) > 1:
        names = ", ".join(file.name for file in files)
        raise LogError(f"{files[0].parent}: expected CSV files or Parquet files only, got both: {names}")
    return [str(file.resolve()) for file in files]
