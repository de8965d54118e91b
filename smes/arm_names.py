"""Names of the scorer's arms as bytes of a fixed length, so that a column of them is an array like any other.

An *arm* is one of the models that a scorer holds side by side; it answers a share of the users, and its answers name
it. Letters: N rows.
"""

import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

MAIN = "main"
"""The arm that answers whoever no other arm answers."""

NAME_BYTES = 16
PATTERN = r"\A[a-z0-9][a-z0-9_-]{0,15}\Z"
EXPECTED = f"the name of an arm: 1 … {NAME_BYTES} of a-z, 0-9, _ and -, the first a letter or digit"

ArmColumn = NDArray[np.uint8]
"""uint8 [N, 16]: a name in ASCII in each row, zeros after it; all zeros where there is none."""

_NAME = re.compile(PATTERN)


def is_arm_name(name: str) -> bool:
    """Whether an arm can have this name."""
    return _NAME.match(name) is not None


def no_arms(n: int) -> ArmColumn:
    """A column of ``n`` rows without a name."""
    return np.zeros((n, NAME_BYTES), np.uint8)


def arm_column(names: Sequence[str | None]) -> ArmColumn:
    """A column of names that are names of arms, or None."""
    encoded = b"".join((name or "").encode("ascii").ljust(NAME_BYTES, b"\0") for name in names)
    return np.frombuffer(encoded, np.uint8).reshape(-1, NAME_BYTES).copy()


def names_of(column: ArmColumn) -> list[str | None]:
    """The inverse of :func:`arm_column`."""
    return [name.decode("ascii") or None for name in _texts(column).tolist()]


def named(column: ArmColumn, name: str) -> NDArray[np.bool_]:
    """Which rows have this name. bool [N]."""
    rows: NDArray[np.bool_] = _texts(column) == name.encode("ascii")
    return rows


def distinct(column: ArmColumn) -> Iterable[str]:
    """The names in a column, each once, in alphabetical order."""
    return (name.decode("ascii") for name in np.unique(_texts(column)).tolist() if name)


def _texts(column: ArmColumn) -> NDArray[np.bytes_]:
    return np.ascontiguousarray(column).view(f"S{NAME_BYTES}").reshape(-1)
