"""Times as people read and write them."""

import re
from datetime import UTC, datetime

_AGO = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_UNIT_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


def utc(unix_ms: int | None) -> str:
    """A time in UTC, to the second; a dash for None."""
    if unix_ms is None:
        return "–"
    return datetime.fromtimestamp(unix_ms / 1000, UTC).isoformat(sep=" ", timespec="seconds").removesuffix("+00:00")


def unix_ms_of(option: str, text: str, now_ms: int) -> int:
    """A time that a person wrote.

    Args:
        option: Names the option in the error.
        text: ISO 8601 (UTC unless it says otherwise), Unix milliseconds, or an age such as ``15m``.
        now_ms: The present time.

    Raises:
        ValueError: It is none of these.
    """
    if ago := _AGO.fullmatch(text):
        return round(now_ms - 1000 * float(ago[1]) * _UNIT_S[ago[2]])
    if text.isdecimal() and len(text) >= 12:
        return int(text)
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"{option} {text!r}: expected a time as 2026-11-27T20:00 (UTC), Unix milliseconds, or an age as 90s, 15m, "
            "2h, 7d"
        ) from None
    return round((when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() * 1000)
