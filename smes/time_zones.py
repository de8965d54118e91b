"""Local time of many moments at once, exact to the second.

The offsets from UTC come from the system's time zone database, through :mod:`zoneinfo`. Letters: N moments.
"""

from datetime import UTC, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

import numpy as np

from smes.arrays import I64

_NO_ZONE = "UTC"
_FIRST, _LAST = datetime(1970, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)
_STEP = timedelta(days=3)  # no two changes of a zone's offset lie as close


def check_time_zone(name: str, where: str) -> None:
    """Check that a zone is known.

    Raises:
        ValueError: It is not; ``where`` says who names it.
    """
    try:
        _changes(name)
    except (KeyError, OSError, ValueError) as error:  # an unknown name is a KeyError
        raise ValueError(f"{where}: time_zone {name!r}, expected a name such as Europe/Berlin ({error})") from error


def local_s(time_ms: I64, zone: str) -> I64:
    """Seconds since 1970 on the clocks of a zone, whole ones, rounded down.

    Args:
        time_ms: int64 [N], Unix milliseconds. Times before 1970 and after 2099 have the zone's offset of these years.
        zone: A name such as ``Europe/Berlin``.
    """
    starts_s, offsets_s = _changes(zone)
    utc_s = time_ms // 1000
    local: I64 = utc_s + offsets_s[np.searchsorted(starts_s, utc_s, side="right")]
    return local


@lru_cache(maxsize=64)
def _changes(name: str) -> tuple[I64, I64]:
    """When a zone's offset changes, ascending, in Unix seconds; and the offsets before, between and behind, seconds."""
    starts, offsets = [], []
    if name == _NO_ZONE:  # needs no database
        return np.zeros(0, np.int64), np.zeros(1, np.int64)
    zone, before = ZoneInfo(name), _FIRST
    offsets.append(_offset_s(before, zone))
    while before < _LAST:
        after = before + _STEP
        if _offset_s(after, zone) != offsets[-1]:
            low, high = int(before.timestamp()), int(after.timestamp())
            while high - low > 1:
                middle = (low + high) // 2
                unchanged = _offset_s(datetime.fromtimestamp(middle, UTC), zone) == offsets[-1]
                low, high = (middle, high) if unchanged else (low, middle)
            starts.append(high)
            offsets.append(_offset_s(after, zone))
        before = after
    return np.array(starts, np.int64), np.array(offsets, np.int64)


def _offset_s(moment: datetime, zone: ZoneInfo) -> int:
    offset = moment.astimezone(zone).utcoffset()
    assert offset is not None, "a zone has offsets"
    return round(offset.total_seconds())
