"""Find the files of a log."""

from dataclasses import dataclass
from pathlib import Path

from smes.errors import LogError
from smes_io.log_spec import CsvFormat, LogSpec, SideTable

TEXT_EXTENSIONS = (".csv", ".tsv", ".txt")
PACKED_EXTENSIONS = (".gz", ".zst")
_EXPECTED = (
    "a file that ends in .parquet, or in .csv, .tsv or .txt with or without .gz or .zst behind it; a text file of "
    "another name needs its delimiter (log.csv.delimiter)"
)
_MOST_LISTED = 12


@dataclass(frozen=True)
class LogFiles:
    """Absolute paths. Each list is in reading order, and all its files are text or all are Parquet.

    Attributes:
        folder: Where the log and its feature tables lie.
        log, user, item: The files of the log and of its feature tables.
    """

    folder: str
    log: list[str]
    user: list[str]
    item: list[str]


def find_files(path: Path, spec: LogSpec) -> LogFiles:
    """Find the log's files and its feature tables.

    Args:
        path: The log's folder, or a log that is a single file.
        spec: Patterns of the files.

    Raises:
        LogError: There is no such file or folder, a pattern matches nothing, or a file is neither text nor Parquet. A
            file of any name is text if the schema file says what separates its fields.
    """
    if not path.exists():
        raise LogError(f"{path}: no such file or folder, expected a log of impressions")
    if path.is_dir():
        folder, log = path, _match(path, spec.files, "log.files")
    else:
        folder, log = path.parent, [path]
    return LogFiles(
        folder=str(folder.resolve()),
        log=_checked(log, spec.csv),
        user=_side_files(folder, spec, spec.user_features, "log.user_features.files"),
        item=_side_files(folder, spec, spec.item_features, "log.item_features.files"),
    )


def is_parquet(path: str | Path) -> bool:
    """Whether a file is Parquet, by its name. What :func:`find_files` finds beside these is text."""
    return Path(path).suffix.lower() == ".parquet"


def is_packed(path: str | Path) -> bool:
    """Whether a text file is compressed, by its name."""
    return Path(path).suffix.lower() in PACKED_EXTENSIONS


def _side_files(folder: Path, spec: LogSpec, table: SideTable | None, key: str) -> list[str]:
    if table is None:
        return []
    return _checked(_match(folder, table.files, key), table.csv or spec.csv.of_another_table())


def _match(folder: Path, patterns: tuple[str, ...], key: str) -> list[Path]:
    found = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    if not found:
        there = sorted(file.name for file in folder.iterdir())
        listed = ", ".join(there[:_MOST_LISTED]) + (", …" if len(there) > _MOST_LISTED else "")
        raise LogError(f"{folder}: expected a file named {' or '.join(patterns)} ({key}), found {listed or 'nothing'}")
    return found


def _kind(file: Path, csv: CsvFormat) -> str | None:
    if is_parquet(file):
        return "parquet"
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in PACKED_EXTENSIONS:
        suffixes.pop()
    return "text" if csv.delimiter is not None or (suffixes and suffixes[-1] in TEXT_EXTENSIONS) else None


def _checked(files: list[Path], csv: CsvFormat) -> list[str]:
    for file in files:
        if _kind(file, csv) is None:
            raise LogError(f"{file}: expected {_EXPECTED}")
    if len({_kind(file, csv) for file in files}) > 1:
        names = ", ".join(file.name for file in files)
        raise LogError(f"{files[0].parent}: expected text files or Parquet files only, got both: {names}")
    return [str(file.resolve()) for file in files]
