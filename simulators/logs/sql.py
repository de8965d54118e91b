"""DuckDB SQL expressions that encode a column of any type as an event column.

Ids become int64: integers (also the texts ``29`` and ``29.0``) are kept, any other text becomes
:func:`smes.hashing.stable_id` of it, and nulls, empty texts and NaN become ``MISSING``. A value's id depends on the
value only, not on the file or the column type it is stored in.
"""

# ruff: noqa: S608 - names are quoted and texts escaped by the functions of sql.py; expressions are the operator's own.

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from smes.hashing import stable_id
from smes.schema import MISSING, Feature

STABLE_ID_FUNCTION = "smes_stable_id"
MISSING_SQL = f"({MISSING + 1}::BIGINT - 1)"  # the literal does not parse: its absolute value exceeds int64
NAN_SQL = "'nan'::FLOAT"

_INTEGERS = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "BOOLEAN"}
_CACHE_LIMIT = 1_000_000


def quote(name: str) -> str:
    """A column name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def text(value: str) -> str:
    """A string as an SQL literal."""
    return "'" + value.replace("'", "''") + "'"


def stable_id_function() -> Callable[[Any], Any]:
    """A vectorised ``stable_id`` over Arrow string arrays, with a cache of the values seen so far."""
    known: dict[str, int] = {}

    def encode(column: Any) -> Any:
        encoded = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        encoded = encoded.dictionary_encode()
        if len(known) > _CACHE_LIMIT:
            known.clear()
        ids = []
        for value in encoded.dictionary.to_pylist():
            if value not in known:
                known[value] = stable_id(value)
            ids.append(known[value])
        return pa.array(ids, pa.int64()).take(encoded.indices)

    return encode


def id_sql(expr: str, sql_type: str) -> str:
    """An id as BIGINT, never null."""
    if sql_type in _INTEGERS:
        return f"COALESCE(CAST({expr} AS BIGINT), {MISSING_SQL})"
    value = f"CAST({expr} AS VARCHAR)"
    integer, number = f"TRY_CAST({value} AS BIGINT)", f"TRY_CAST({value} AS DOUBLE)"
    return (
        f"CASE WHEN {expr} IS NULL OR trim({value}) = '' OR isnan({number}) THEN {MISSING_SQL} "
        f"WHEN CAST({integer} AS DOUBLE) = {number} THEN {integer} "
        f"ELSE {STABLE_ID_FUNCTION}({value}) END"
    )


def bag_sql(expr: str, sql_type: str, feature: Feature, separator: str) -> str:
    """A bag or sequence as BIGINT[max_length], never null, padded with ``MISSING``."""
    if sql_type.endswith("]"):
        element_type = sql_type[: sql_type.rindex("[")]
        items = f"CAST({expr} AS {element_type}[])"
    else:
        element_type = "VARCHAR"
        items = f"string_split(CAST({expr} AS VARCHAR), {text(separator)})"
    present = "x IS NOT NULL" if element_type in _INTEGERS else "trim(CAST(x AS VARCHAR)) <> ''"
    items = f"list_filter({items}, lambda x: {present})"
    kept = f"list_slice({items}, 1, {feature.max_length})"
    ids = f"list_transform({kept}, lambda x: {id_sql('x', element_type)})"
    padded = f"list_resize(COALESCE({ids}, []::BIGINT[]), {feature.max_length}, {MISSING_SQL})"
    return f"CAST({padded} AS BIGINT[{feature.max_length}])"


def numeric_sql(expr: str) -> str:
    """A number as FLOAT, never null; NaN if the value is absent or not finite."""
    value = f"TRY_CAST({expr} AS FLOAT)"
    return f"CASE WHEN isfinite({value}) THEN {value} ELSE {NAN_SQL} END"


def feature_sql(feature: Feature, expr: str, sql_type: str, separator: str) -> str:
    """The encoding of one feature's values."""
    if feature.kind == "numeric":
        return numeric_sql(expr)
    if feature.is_list:
        return bag_sql(expr, sql_type, feature, separator)
    return id_sql(expr, sql_type)


def absent_sql(feature: Feature) -> str:
    """The encoding of a feature that has no value, for entities without a row in the feature table."""
    if feature.kind == "numeric":
        return NAN_SQL
    if feature.is_list:
        return f"CAST(list_resize([]::BIGINT[], {feature.max_length}, {MISSING_SQL}) AS BIGINT[{feature.max_length}])"
    return MISSING_SQL


def time_sql(expr: str, unit: str) -> str:
    """A time as Unix milliseconds (BIGINT); null if the value is not a time."""
    if unit == "timestamp":
        return f"epoch_ms(TRY_CAST({expr} AS TIMESTAMPTZ))"
    factor = {"s": "1000", "ms": "1", "us": "0.001"}[unit]
    exact = f"TRY_CAST({expr} AS BIGINT)"
    rounded = f"TRY_CAST(round(TRY_CAST({expr} AS DOUBLE) * {factor}) AS BIGINT)"
    return f"COALESCE({exact}, {rounded})" if unit == "ms" else rounded


def number_sql(expr: str, sql_type: str) -> str:
    """A label as DOUBLE; null if the value is not a number. ``true`` and ``false`` are 1 and 0."""
    if sql_type == "VARCHAR":
        words = f"CASE lower(trim({expr})) WHEN 'true' THEN 1.0 WHEN 'false' THEN 0.0 END"
        return f"COALESCE(TRY_CAST({expr} AS DOUBLE), {words})"
    return f"TRY_CAST({expr} AS DOUBLE)"


def is_blank_sql(expr: str, sql_type: str) -> str:
    """True for a label without a value, which is not the same as an unusable value."""
    value = f"CAST({expr} AS VARCHAR)"
    blank = f"{expr} IS NULL"
    if sql_type == "VARCHAR":
        blank += f" OR trim({value}) = ''"
    return f"({blank} OR COALESCE(isnan({number_sql(expr, sql_type)}), false))"


def scan_sql(files: Sequence[str], delimiter: str) -> str:
    """A table expression over CSV (all columns as text) or Parquet files, in the given order."""
    if files[0].lower().endswith(".parquet"):
        return f"read_parquet([{', '.join(text(f) for f in files)}], union_by_name = true)"
    options = f"all_varchar = true, header = true, delim = {text(delimiter)}, quote = '\"', store_rejects = true"
    scans = [f"SELECT * FROM read_csv({text(f)}, {options})" for f in files]
    return f"({' UNION ALL BY NAME '.join(scans)})"  # read_csv has no union_by_name together with store_rejects
