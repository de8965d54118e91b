"""Find the tables in a folder and read a bounded sample of each into a database, to look at their columns.

Files of the same columns are one table. A large table is read in pieces from all over its files, whole rows each, so
that a log which is sorted by user or by time is seen from its beginning to its end.
"""

# ruff: noqa: S608 - names are quoted and texts escaped by the functions of sql.py.

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import duckdb

from simulators.logs import sql
from simulators.logs.csv_files import pieces
from simulators.logs.files import TEXT_EXTENSIONS, is_packed, is_parquet
from simulators.logs.infer_format import TextLayout, text_layout
from simulators.logs.parts import TableFiles
from smes.errors import LogError
from smes_io.log_spec import NULL_WORDS, CsvFormat

SAMPLE_BYTES = 48 << 20
_SAMPLE_ROWS = 600_000
_PIECES = 48
_MOST_FILES = 400
_MOST_SAMPLED = 64
SPLITS = re.compile(r"(?:^|[^a-z])(?:test|train|valid|validation|dev|base|split|fold|random|sample|statistics?)", re.I)
"""Names of files that hold a part of the log again, another exposure, or counts of the future."""


@dataclass
class Table:
    """Files of the same columns, and a sample of them in the database.

    Attributes:
        name: Of the sample in the database.
        files: In reading order.
        layout: How text is written; None for Parquet.
        columns: Column → SQL type in the sample.
        bytes: Of all files.
        sampled: Whether the sample is less than everything.
        rows: Of the sample.
        made_up: Whether the names of its columns were made up here.
    """

    name: str
    files: list[Path]
    layout: TextLayout | None
    columns: dict[str, str]
    bytes: int
    sampled: bool = False
    rows: int = 0
    made_up: bool = False

    @property
    def named(self) -> bool:
        """Whether the files name their columns."""
        return self.layout is None or None not in self.layout.columns

    @cached_property
    def is_split(self) -> bool:
        """Whether the files' names say that they hold a part of a log, or counts over it."""
        return all(SPLITS.search(file.name) for file in self.files)

    @property
    def words(self) -> str:
        """The names of the files, in lower case."""
        return " ".join(file.name.lower() for file in self.files)


class LogSample:
    """The tables of a log. A context manager: the database and its folder go on exit.

    Args:
        path: A file, or a folder with files.
        progress: Called with (files read, name) along the way.

    Raises:
        LogError: There is no such file or folder, or no table in it.
    """

    def __init__(self, path: Path, progress: Callable[[int, str], None] = lambda done, name: None) -> None:
        if not path.exists():
            raise LogError(f"{path}: no such file or folder, expected a log of impressions")
        if not os.access(path, os.R_OK):
            raise LogError(f"{path}: cannot be read: permission denied")
        self.path, self.folder = path, path if path.is_dir() else path.parent
        self._temp = Path(tempfile.mkdtemp(prefix="smes-infer-"))
        config: dict[str, Any] = {"memory_limit": "1GB", "temp_directory": f"{self._temp}/spill"}
        self._connection = duckdb.connect(f"{self._temp}/sample.duckdb", config=config)
        self._connection.execute(
            "SET TimeZone = 'UTC'; SET enable_progress_bar = false; SET disabled_optimizers = 'statistics_propagation'"
        )
        self.tables: list[Table] = []
        self.unread: list[str] = []
        try:
            for index, group in enumerate(self._groups()):
                progress(index, group.files[0].name)
                self._load(group)
                if group.rows:
                    self.tables.append(group)
                else:
                    self.unread += [file.name for file in group.files]
            if not self.tables:
                raise LogError(f"{path}: no file that can be read as a table, expected text with delimiters or Parquet")
        except BaseException:
            self.close()
            raise

    def rows(self, query: str) -> list[Any]:
        """Run a query over the samples."""
        try:
            found: list[Any] = self._connection.execute(query).fetchall()
        except duckdb.Error as error:
            raise LogError(f"{self.path}: {str(error).strip().splitlines()[0]}") from error
        return found

    def arrow(self, query: str) -> Any:
        """The same, as an Arrow table."""
        return self._connection.sql(query).to_arrow_table()

    def rename(self, table: Table, names: Sequence[str]) -> None:
        """Name the columns of a table whose files do not."""
        assert table.layout is not None
        for old, new in zip(list(table.columns), names, strict=True):
            self._connection.execute(f"ALTER TABLE {table.name} RENAME {sql.quote(old)} TO {sql.quote(f'_{new}')}")
        for new in names:
            self._connection.execute(f"ALTER TABLE {table.name} RENAME {sql.quote(f'_{new}')} TO {sql.quote(new)}")
        table.columns = dict(zip(names, table.columns.values(), strict=True))
        table.layout = replace(table.layout, csv=replace(table.layout.csv, names=tuple(names)), columns=tuple(names))

    def close(self) -> None:
        """Remove everything that was written. Idempotent."""
        self._connection.close()
        shutil.rmtree(self._temp, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _groups(self) -> list[Table]:
        """Files by their columns; the path's own first."""
        there = sorted(file for file in self.folder.iterdir() if file.is_file() and file.name[0] != ".")
        own = [self.path] if self.path.is_file() else []
        groups: dict[Any, list[tuple[Path, TextLayout | None, dict[str, str]]]] = {}
        for file in [*own, *[file for file in there if file not in own][:_MOST_FILES]]:
            layout, columns = None, {}
            if is_parquet(file):
                columns = self._parquet_columns(file)
            elif file.suffix.lower() not in (".py", ".pl", ".sh", ".yaml", ".yml", ".json", ".md", ".html", ".pdf"):
                layout = text_layout(file)
            if layout is None and not columns:
                self.unread.append(file.name)
                continue
            names: Any = tuple(columns) if layout is None else (layout.columns, layout.csv.delimiter)
            if layout is not None and None in layout.columns:
                names = (*names, _suffix(file))
            elsewhere = bool(own) and file not in own  # a file that was named is the log as it stands
            split = bool(SPLITS.search(file.name))
            groups.setdefault((names, elsewhere, split), []).append((file, layout, columns))
        tables = []
        for index, members in enumerate(groups.values()):
            layouts = [layout for _, layout, _ in members if layout is not None]
            files = [file for file, _, _ in members]
            size = sum(file.stat().st_size for file in files)
            tables.append(Table(f"t{index}", files, _agreed(layouts), members[0][2], size))
        return tables

    def _parquet_columns(self, file: Path) -> dict[str, str]:
        try:
            found = self._connection.execute(f"DESCRIBE SELECT * FROM read_parquet({sql.text(str(file))})").fetchall()
        except duckdb.Error:
            return {}
        return {str(row[0]): str(row[1]) for row in found}

    def _load(self, table: Table) -> None:
        """Read the sample."""
        files = table.files
        if len(files) > _MOST_SAMPLED:
            files, table.sampled = files[:: -(-len(files) // _MOST_SAMPLED)], True
        budget = SAMPLE_BYTES // len(files)
        csv = CsvFormat()
        if table.layout is not None:
            csv = table.layout.csv
            if not table.named:
                csv = replace(csv, names=tuple(f"column{i + 1}" for i in range(len(table.layout.columns))))
            parts = [self._sampled(table, file, budget, i) for i, file in enumerate(files)]
            csv = replace(csv, encoding="utf-8")
        else:
            parts = [str(file) for file in files]
        read = TableFiles(self._connection, parts, csv, NULL_WORDS, self._temp / f"{table.name}-text")
        types = {name: types[0] if len(types) == 1 else "VARCHAR" for name, types in read.columns.items()}
        rows = sum(read.rows)
        share = "" if table.layout is not None or rows <= _SAMPLE_ROWS else _system_sample(rows)
        table.sampled |= bool(share)
        chosen = ", ".join(f"CAST({sql.quote(n)} AS {t}) AS {sql.quote(n)}" for n, t in types.items())
        selects = [f"SELECT {chosen} FROM {part.scan}{share}" for part in read.parts if set(types) <= set(part.types)]
        self._connection.execute(f"CREATE TABLE {table.name} AS {' UNION ALL '.join(selects)}")
        table.columns, table.rows = types, self.rows(f"SELECT count(*) FROM {table.name}")[0][0]

    def _sampled(self, table: Table, file: Path, budget: int, index: int) -> str:
        """A copy of a text file in UTF-8, or of pieces of it, which its layout describes."""
        assert table.layout is not None
        out, csv = self._temp / f"{table.name}-{index}.csv", table.layout.csv
        whole = is_packed(file) or csv.encoding == "utf-16" or file.stat().st_size <= budget
        with out.open("wb") as copy:
            written = 0
            for piece in pieces(str(file)) if whole else _spread(file, budget, csv.skip_lines + (not csv.names)):
                copy.write(piece)
                written += len(piece)
                if written > 2 * budget:  # a packed file is longer than it looks: its beginning must do
                    table.sampled = True
                    break
        table.sampled |= not whole
        if csv.encoding != "utf-8":
            text = out.read_bytes().decode(csv.encoding, errors="replace")
            out.write_text(text, encoding="utf-8", newline="")
        return str(out)


def _spread(file: Path, budget: int, head_lines: int) -> Any:
    """The first lines of a file, and pieces from all over it, whole lines each."""
    size = file.stat().st_size
    with file.open("rb") as source:
        for _ in range(head_lines):
            yield source.readline()
        start = source.tell()
        for i in range(_PIECES):
            at = start + (size - start) * i // _PIECES
            source.seek(at)
            if i:
                source.readline()
            yield source.read(budget // _PIECES) + source.readline()


def _system_sample(rows: int) -> str:
    return f" USING SAMPLE {100 * _SAMPLE_ROWS / rows:.6f} PERCENT (system, 0)"


def _suffix(file: Path) -> str:
    """What tells the tables of files without a header apart: the extension, or the name where it is a common one."""
    suffix = file.suffix.lower()
    return re.sub(r"\d+", "#", file.stem) if suffix in (*TEXT_EXTENSIONS, ".dat") else suffix


def _agreed(layouts: Sequence[TextLayout]) -> TextLayout | None:
    """One layout for files of the same columns: an encoding that is no UTF-8 in one of them holds for all."""
    if not layouts:
        return None
    unusual = [layout for layout in layouts if layout.csv.encoding != "utf-8"]
    return (unusual or list(layouts))[0]
