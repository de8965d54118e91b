"""DuckDB SQL expressions that encode a column of any type as an event column.

Ids become int64 by the rule of :func:`smes.hashing.encode_id`. A value's id depends on the value only, not on the file
or the column type that it is stored in. Nulls, NaN and the declared null words become ``MISSING``.
"""

import ast
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pyarrow as pa

from smes.hashing import EXACT_DOUBLE, stable_id
from smes.schema import MISSING, Feature

STABLE_ID_FUNCTION = "smes_stable_id"
LIST_FUNCTION = "smes_list"
MISSING_SQL = f"({MISSING + 1}::BIGINT - 1)"  # the literal does not parse: its absolute value exceeds int64
NAN_SQL = "'nan'::FLOAT"

Family = Literal["integer", "wide", "float", "decimal", "text", "time", "bytes", "list", "other"]

_FAMILIES: dict[Family, set[str]] = {
    "integer": {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "BOOLEAN"},
    "wide": {"UBIGINT", "HUGEINT", "UHUGEINT"},
    "float": {"FLOAT", "DOUBLE"},
    "text": {"VARCHAR", "JSON", "UUID"},
    "bytes": {"BLOB"},
}
_EXACT = {"FLOAT": 2.0**24, "DOUBLE": EXACT_DOUBLE}  # from here on a neighbouring integer has the same value
_CACHE_LIMIT = 1_000_000
_PYTHON_ELEMENT = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|-?[0-9][0-9.e+-]*|None|True|False""")
_PYTHON_LIST = re.compile(rf"\[\s*(?:(?:{_PYTHON_ELEMENT.pattern})\s*(?:,\s*(?!\])|(?=\])))*\]")


def family(sql_type: str) -> Family:
    """What kind of values a type holds."""
    if sql_type.endswith("]"):
        return "list"
    for name, types in _FAMILIES.items():
        if sql_type in types:
            return name
    if sql_type.startswith("DECIMAL("):
        return "decimal"
    if sql_type.startswith("ENUM("):
        return "text"
    return "time" if sql_type.startswith(("DATE", "TIME")) else "other"


def element_type(sql_type: str) -> str:
    """The type of a list's elements."""
    return sql_type[: sql_type.rindex("[")]


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


def list_function(column: Any) -> Any:
    """The elements of texts in brackets, as an Arrow array of lists of texts; null for a text that is no list."""
    return pa.array([_elements(value) for value in column.to_pylist()], pa.list_(pa.string()))


def _elements(value: str | None) -> list[str | None] | None:
    """The elements of a list that is written as JSON, or as Python writes lists, as they are written there."""
    if value is None:
        return None
    try:
        found = json.loads(value, parse_int=str, parse_float=str, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _python_elements(value.strip())
    if not all(isinstance(x, str | bool | None) for x in found):
        return None
    return [str(x) if isinstance(x, bool) else x for x in found]


def _python_elements(value: str) -> list[str | None] | None:
    if _PYTHON_LIST.fullmatch(value) is None:  # such as NumPy's, which has no commas
        return None
    try:
        found = [str(ast.literal_eval(x)) if x[0] in "'\"" else x for x in _PYTHON_ELEMENT.findall(value)]
    except (ValueError, SyntaxError):
        return None
    return [None if x == "None" else x for x in found]


def _refuse(word: str) -> None:
    raise ValueError(f"{word}, expected a number")


def no_value_sql(expr: str, sql_type: str, null_words: Sequence[str] = ()) -> str:
    """True where there is nothing: null, NaN, a null word, a list without elements."""
    match family(sql_type):
        case "text":
            value = _as_text(expr, sql_type)
            words = "".join(f" OR {value} = {text(word)}" for word in dict.fromkeys(("", *null_words)))
            return f"({expr} IS NULL{words})"
        case "float":
            return f"({expr} IS NULL OR isnan({expr}))"
        case "list":
            absent = no_value_sql("x", element_type(sql_type), null_words)
            return f"(COALESCE(len(list_filter({_items(expr, sql_type, None)}, lambda x: NOT {absent})), 0) = 0)"
    return f"({expr} IS NULL)"


def id_sql(expr: str, sql_type: str, null_words: Sequence[str] = ()) -> str:
    """An id as BIGINT, never null."""
    if sql_type == "BIGINT":
        least = stable_id(str(MISSING))
        return f"CASE WHEN {expr} IS NULL THEN {MISSING_SQL} WHEN {expr} = {MISSING_SQL} THEN {least} ELSE {expr} END"
    absent = no_value_sql(expr, sql_type, null_words)
    match family(sql_type):
        case "integer":
            return f"COALESCE(CAST({expr} AS BIGINT), {MISSING_SQL})"
        case "float":
            value, whole = f"CAST({expr} AS VARCHAR)", f"{expr} = trunc({expr}) AND abs({expr}) < {EXACT_DOUBLE!r}"
            known = f"WHEN {whole} THEN CAST({expr} AS BIGINT)"
            return f"CASE WHEN {absent} THEN {MISSING_SQL} {known} ELSE {STABLE_ID_FUNCTION}({value}) END"
        case "decimal":
            value = f"CAST({expr} AS VARCHAR)"
            value = f"CASE WHEN contains({value}, '.') THEN rtrim(rtrim({value}, '0'), '.') ELSE {value} END"
        case "bytes":
            value = f"decode({expr})"
        case _:
            value = _as_text(expr, sql_type)
    integer = f"TRY_CAST({value} AS BIGINT)"
    # Written as an integer: digits without a leading zero or plus, with .0 behind them or not, within int64. TRY_CAST
    # reads more than that, so the pattern decides and the cast tells whether it fits.
    written = f"regexp_full_match({value}, '-?(0|[1-9][0-9]{{0,18}})(\\.0)?')"
    return (
        f"CASE WHEN {absent} THEN {MISSING_SQL} "
        f"WHEN {written} AND {integer} > {MISSING_SQL} THEN {integer} "
        f"ELSE {STABLE_ID_FUNCTION}({value}) END"
    )


def inexact_id_sql(expr: str, sql_type: str) -> str | None:
    """True where an id is a float so large that another integer may have become it; None if none can be."""
    if sql_type in _EXACT:
        return f"COALESCE(NOT isnan({expr}) AND abs({expr}) >= {_EXACT[sql_type]!r}, false)"
    if family(sql_type) == "list" and (inner := inexact_id_sql("x", element_type(sql_type))) is not None:
        return f"COALESCE(list_bool_or(list_transform({expr}, lambda x: {inner})), false)"
    return None


def bag_sql(expr: str, sql_type: str, feature: Feature, separator: str | None, null_words: Sequence[str] = ()) -> str:
    """A bag or sequence as BIGINT[max_length], never null, padded with ``MISSING``."""
    items, inner = (
        _items(expr, sql_type, separator),
        element_type(sql_type) if family(sql_type) == "list" else "VARCHAR",
    )
    items = f"list_filter({items}, lambda x: NOT {no_value_sql('x', inner, null_words)})"
    kept = f"list_slice({items}, 1, {feature.max_length})"
    ids = f"list_transform({kept}, lambda x: {id_sql('x', inner, null_words)})"
    padded = f"list_resize(COALESCE({ids}, []::BIGINT[]), {feature.max_length}, {MISSING_SQL})"
    return f"CAST({padded} AS BIGINT[{feature.max_length}])"


def _items(expr: str, sql_type: str, separator: str | None) -> str:
    """The elements of a list, or of a text that holds one."""
    if family(sql_type) == "list":
        return f"CAST({expr} AS {element_type(sql_type)}[])"  # arrays of fixed size become lists
    value = _as_text(expr, sql_type)
    split = (
        f"string_split(replace({value}, '|', ','), ',')"
        if separator is None
        else f"string_split({value}, {text(separator)})"
    )
    trimmed = f"list_transform({split}, lambda x: trim(x))"
    return f"CASE WHEN {_in_brackets(value)} THEN {LIST_FUNCTION}({value}) ELSE {trimmed} END"


def _in_brackets(value: str) -> str:
    return f"(starts_with(ltrim({value}), '[') AND ends_with(rtrim({value}), ']'))"


def finite_sql(number: str) -> str:
    """A number (:func:`number_sql`) as FLOAT, never null; NaN if it is absent or not finite."""
    return f"CASE WHEN isfinite({number}) THEN {number} ELSE {NAN_SQL} END"


def number_sql(expr: str, sql_type: str, target: str, null_words: Sequence[str] = ()) -> str:
    """A value as FLOAT or DOUBLE; null if it is no number, or absent. ``true`` and ``false`` are 1 and 0."""
    if family(sql_type) != "text":
        return f"TRY_CAST({expr} AS {target})"
    value = _as_text(expr, sql_type)
    words = f"CASE lower(trim({value})) WHEN 'true' THEN 1::{target} WHEN 'false' THEN 0::{target} END"
    number = f"COALESCE(TRY_CAST({value} AS {target}), {words})"
    return f"CASE WHEN {no_value_sql(expr, sql_type, null_words)} THEN NULL ELSE {number} END"


def no_number_sql(expr: str, sql_type: str, number: str, null_words: Sequence[str] = ()) -> str:
    """True for a number that is not there: like :func:`no_value_sql`, and the text ``nan``.

    Args:
        expr, sql_type, null_words: The value.
        number: The same as a number (:func:`number_sql`).
    """
    absent = no_value_sql(expr, sql_type, null_words)
    if family(sql_type) != "text":
        return absent
    return f"({absent} OR trim({_as_text(expr, sql_type)}) = '' OR COALESCE(isnan({number}), false))"


def _as_text(expr: str, sql_type: str) -> str:
    return expr if sql_type == "VARCHAR" else f"CAST({expr} AS VARCHAR)"


def feature_sql(
    feature: Feature, expr: str, sql_type: str, separator: str | None, null_words: Sequence[str] = ()
) -> str:
    """The encoding of the values of a feature that is no number."""
    if feature.is_list:
        return bag_sql(expr, sql_type, feature, separator, null_words)
    return id_sql(expr, sql_type, null_words)


def feature_no_value_sql(feature: Feature, expr: str, sql_type: str, null_words: Sequence[str] = ()) -> str:
    """True where a feature that is no number has nothing."""
    absent = no_value_sql(expr, sql_type, null_words)
    empty_list = feature.is_list and family(sql_type) == "text"
    return f"({absent} OR trim({_as_text(expr, sql_type)}) IN ('', '[]'))" if empty_list else absent


def unreadable_sql(feature: Feature, expr: str, sql_type: str) -> str | None:
    """True where a feature that is no number holds something that it cannot read; None if that cannot be."""
    if feature.is_list and family(sql_type) == "text":
        value = _as_text(expr, sql_type)
        return f"COALESCE({_in_brackets(value)} AND {LIST_FUNCTION}({value}) IS NULL, false)"
    return None


def absent_sql(feature: Feature) -> str:
    """The encoding of a feature that has no value, for entities without a row in the feature table."""
    if feature.kind == "numeric":
        return NAN_SQL
    if feature.is_list:
        return f"list_resize([]::BIGINT[], {feature.max_length}, {MISSING_SQL})"
    return MISSING_SQL


def any_length_sql(column: str) -> str:
    """A column of bags as BIGINT[], as they have to be stored where a left join reads them.

    The left join of DuckDB 2.0 fails where it finds no row for a column of a fixed length ("Cannot cast list with
    length 0 to array with length 2").
    """
    return f"CAST({column} AS BIGINT[]) AS {column}"


def fixed_sql(feature: Feature, expr: str) -> str:
    """What :func:`any_length_sql` stored, joined or not, as BIGINT[max_length] again; other features as they are."""
    return f"CAST({expr} AS BIGINT[{feature.max_length}])" if feature.is_list else expr


def time_sql(expr: str, unit: str) -> str:
    """A time as Unix milliseconds (BIGINT); null if the value is not a time."""
    if unit == "timestamp":
        return f"epoch_ms(TRY_CAST({expr} AS TIMESTAMPTZ))"
    factor = {"s": "1000", "ms": "1", "us": "0.001"}[unit]
    exact = f"TRY_CAST({expr} AS BIGINT)"
    rounded = f"TRY_CAST(round(TRY_CAST({expr} AS DOUBLE) * {factor}) AS BIGINT)"
    return f"COALESCE({exact}, {rounded})" if unit == "ms" else rounded
