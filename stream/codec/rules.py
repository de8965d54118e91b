"""What a good event is: the limits of its values, and why an event is refused, as a short code and in words.

Both wire codecs check whole columns by these rules. Letters: N rows.
"""

import reprlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from smes.arrays import I32, I64, Bool
from smes.schema import Schema

Code = Literal[
    "unparsable",  # not JSON, not an Arrow stream, or not an event at all
    "unknown_codec",  # the codec header names no codec we have
    "schema_mismatch",  # the schema header differs, or is absent where it is required
    "missing_field",  # a required field is absent or null
    "bad_id",  # not an integer, outside int64, or the null sentinel
    "bad_time",  # event_time_ms is not a positive int64
    "future_time",  # event_time_ms lies too far after the record's arrival
    "bad_number",  # a numeric feature or a score is no finite float32
    "bad_type",  # another value of the wrong type
    "misaligned",  # a sequence of another length than the one it accompanies
    "unknown_task",  # feedback of a task that the schema does not have
    "label_range",  # a label outside its task's range
]

MAX_ID = int(np.iinfo(np.int64).max)
MIN_ID = -MAX_ID
"""Ids are int64 without the smallest value, which is the null of every id column (``smes.schema.MISSING``)."""

MAX_FLOAT = float(np.finfo(np.float32).max)
"""Largest number: all are finite as float32."""

_REPR = reprlib.Repr()
_REPR.maxlevel = 2
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60


@dataclass(frozen=True, slots=True)
class Problem:
    """Why an event is refused.

    Attributes:
        code: Short and stable, for counters.
        reason: For people: what was expected and what the event had; at most a few hundred characters.
        field: Dotted name of the field at fault, None where it is the event as a whole.
    """

    code: Code
    reason: str
    field: str | None = None


def quoted(value: object) -> str:
    """``value`` as a reason quotes it: its representation, cut to about 60 characters."""
    return _REPR.repr(value)


def bad_times(event_time_ms: I64, arrival_ms: I64, max_future_ms: int) -> Bool:
    """Rows whose time is not positive or more than ``max_future_ms`` after the record's arrival. bool [N]."""
    # Not arrival + max_future: that overflows for an absurd arrival; for a positive time the difference cannot.
    bad: Bool = (event_time_ms <= 0) | (event_time_ms - max_future_ms > arrival_ms)
    return bad


def bad_labels(task: I32, value: NDArray[np.float32] | NDArray[np.float64], schema: Schema) -> Bool:
    """Rows whose label is outside its task's range, bool [N]; rows of an unknown task (index -1) are not judged.

    Binary labels are compared as they are; the upper bound of a regression label is compared as float32, so that a
    ``max_value`` that float32 cannot hold exactly is still reached by a float32 column.
    """
    binary = np.array([t.kind == "binary" for t in schema.tasks])
    highest = np.array([t.max_value for t in schema.tasks], np.float32)
    with np.errstate(over="ignore"):  # beyond float32 becomes inf, which is out of range as it should be
        value_f32 = value.astype(np.float32)
    regression_ok = (value >= 0) & (value_f32 <= highest[task]) & np.isfinite(value_f32)
    ok = np.where(binary[task], (value == 0) | (value == 1), regression_ok)
    bad: Bool = ~ok & (task >= 0)
    return bad
