"""A table's files, grouped into parts: files that follow each other and have the same columns of the same types.

Values are encoded part by part, before the types of different files are unified: a file that keeps ids as integers and
another that keeps them as doubles must not make doubles of all.
"""

# ruff: noqa: S608 - names are quoted and texts escaped by the functions of sql.py; expressions are the operator's own.

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import duckdb

from simulators.logs import sql
from simulators.logs.csv_files import CsvFile, delimiter_of, line_of_row, prepare
from simulators.logs.files import is_parquet
from smes.errors import LogError
from smes_io.log_spec import CsvFormat

_MOST_LISTED = 60


@dataclass(frozen=True)
class Part:
    """Files of the same columns.

    Attributes:
        where: The files, for messages.
        scan: A table expression over them.
        types: Column → SQL type.
        null_words: Texts that stand for no value and are not yet null in ``scan``; the empty text always is one.
        hint: What to say where a column is missing.
    """

    where: str
    scan: str
    types: dict[str, str]
    null_words: tuple[str, ...]
    hint: str = ""

    def column(self, name: str, key: str, hint: str = "") -> str:
        """The quoted column.

        Raises:
            LogError: There is no such column. The message lists the columns of the files.
        """
        if name not in self.types:
            there = ", ".join(list(self.types)[:_MOST_LISTED])
            raise LogError(
                f"{self.where}: no column {name!r}, expected by {key}; the columns are {there}{self.hint}{hint}"
            )
        return sql.quote(name)

    @cached_property
    def sample(self) -> str:
        """A table expression with the same columns and types that opens no file."""
        nulls = ", ".join(f"CAST(NULL AS {sql_type}) AS {sql.quote(name)}" for name, sql_type in self.types.items())
        return f"(SELECT {nulls})"


class TableFiles:
    """The files of a log or of a feature table: their parts, rows and lines.

    Attributes:
        where: The files, for messages.
        files: Their paths in reading order.
        parts: Their parts in reading order.
        rows: The number of good rows of each file.
        texts: What is known of each text file, bad lines among it; empty for Parquet.
    """

    def __init__(
        self, connection: Any, files: Sequence[str], csv: CsvFormat, null_words: tuple[str, ...], folder: Path
    ) -> None:
        self._connection, self._csv = connection, csv
        self.files = list(files)
        self.where = files[0] if len(files) == 1 else f"{files[0]} … {files[-1]}"
        self.texts: list[CsvFile] = []
        if not is_parquet(files[0]):
            self.texts = [prepare(file, csv, folder) for file in files]
            self.rows = [text.scan.rows for text in self.texts]
            self.parts = [*_text_parts(self.texts, csv, null_words)]
        else:
            types = [self._parquet_types(file) for file in files]
            self.rows = [self._parquet_rows(file) for file in files]
            self.parts = [*_parquet_parts(files, types, null_words)]
        self._ends = [*accumulate(self.rows)]

    @property
    def columns(self) -> dict[str, list[str]]:
        """Column → the types that it has in different parts."""
        found: dict[str, list[str]] = {}
        for part in self.parts:
            for name, sql_type in part.types.items():
                found.setdefault(name, [])
                if sql_type not in found[name]:
                    found[name].append(sql_type)
        return found

    def place(self, row: int) -> tuple[str, int]:
        """The file of a row, and its number there: for a text file the line; for Parquet the row, from 1.

        Args:
            row: Its number in all files, from 0.
        """
        file = bisect_right(self._ends, row)
        inside = row - (self._ends[file - 1] if file else 0)
        return self.files[file], line_of_row(self.texts[file], inside, self._csv) if self.texts else inside + 1

    def _parquet_types(self, file: str) -> dict[str, str]:
        query = f"DESCRIBE SELECT * FROM read_parquet({sql.text(file)})"
        return describe(self._connection, query, file, "a table of Parquet")

    def _parquet_rows(self, file: str) -> int:
        query = f"SELECT num_rows FROM parquet_file_metadata({sql.text(file)})"
        return int(self._connection.execute(query).fetchall()[0][0])


def describe(connection: Any, query: str, where: str, expected: str) -> dict[str, str]:
    """Column → SQL type of a query.

    Raises:
        LogError: DuckDB refuses it.
    """
    try:
        return {str(r[0]): str(r[1]) for r in connection.execute(query).fetchall()}
    except duckdb.Error as error:
        first = str(error).strip().splitlines()[0]
        raise LogError(f"{where}: expected {expected}, DuckDB says: {first}") from error


def _text_parts(texts: Sequence[CsvFile], csv: CsvFormat, null_words: tuple[str, ...]) -> Any:
    for (names, skip, delimiter), group in groupby(texts, lambda t: (t.names, t.skip, delimiter_of(t.path, csv))):
        files = [*group]
        # DuckDB takes no null words with these in them; SQL compares those.
        marks = {*delimiter, csv.quote, csv.escape} - {""}
        inline = [word for word in dict.fromkeys(("", *null_words)) if not marks & {*word}]
        options = {
            "auto_detect": "false",
            "columns": "{" + ", ".join(f"{sql.text(name)}: 'VARCHAR'" for name in names) + "}",
            "header": "false",
            "skip": str(skip),
            "delim": sql.text(delimiter),
            "quote": sql.text(csv.quote),
            "escape": sql.text((csv.escape or csv.quote) if csv.quote else ""),
            "comment": "''",
            "new_line": r"'\n'",
            "nullstr": f"[{', '.join(map(sql.text, inline))}]",
            "compression": "'none'",
            "hive_partitioning": "false",
        }
        words = tuple(word for word in null_words if word not in inline)
        paths = ", ".join(sql.text(file.read) for file in files)
        scan = f"read_csv([{paths}], {', '.join(f'{key} = {value}' for key, value in options.items())})"
        head = (
            f" (line {csv.skip_lines + 1} is taken as the header: log.csv.skip_lines passes over lines before it, and "
        )
        hint = "" if csv.names else f"{head}log.csv.names is for files without one)"
        yield Part(_where([file.path for file in files]), scan, dict.fromkeys(names, "VARCHAR"), words, hint)


def _parquet_parts(files: Sequence[str], types: Sequence[dict[str, str]], null_words: tuple[str, ...]) -> Any:
    for columns, group in groupby(zip(types, files, strict=True), lambda pair: pair[0]):
        paths = [file for _, file in group]
        scan = f"read_parquet([{', '.join(map(sql.text, paths))}])"
        yield Part(_where(paths), scan, columns, null_words)


def _where(files: Sequence[str]) -> str:
    return files[0] if len(files) == 1 else f"{files[0]} … {files[-1]}"
