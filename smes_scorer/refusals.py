"""Which snapshots were refused, why, and when to try them again."""

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from feature_store.manifest import Manifest

_RETRY_S = 5.0  # doubled after each failure
_LONGEST_RETRY_S = 300.0
_MOST = 100


@dataclass(slots=True)
class _Refusal:
    reason: str
    tries: int
    again_s: float


class Refusals:
    """Remembers the last refusals.

    Bytes that make no model are not tried again; others, after longer and longer pauses.

    Args:
        monotonic_s: Clock of the pauses.
    """

    def __init__(self, monotonic_s: Callable[[], float]) -> None:
        self._monotonic_s = monotonic_s
        self._by_bytes: OrderedDict[Hashable, _Refusal] = OrderedDict()

    def why(self, manifest: Manifest) -> str | None:
        """Why these bytes are not to be tried now, None if they are."""
        refusal = self._by_bytes.get(_bytes_of(manifest))
        return None if refusal is None or self._monotonic_s() >= refusal.again_s else refusal.reason

    def note(self, manifest: Manifest, reason: str, *, for_ever: bool) -> None:
        """Note that they were refused."""
        before = self._by_bytes.pop(_bytes_of(manifest), None)
        tries = before.tries + 1 if before else 1
        pause_s = math.inf if for_ever else min(_RETRY_S * 2 ** (tries - 1), _LONGEST_RETRY_S)
        self._by_bytes[_bytes_of(manifest)] = _Refusal(reason, tries, self._monotonic_s() + pause_s)
        if len(self._by_bytes) > _MOST:
            self._by_bytes.popitem(last=False)


def _bytes_of(manifest: Manifest) -> Hashable:
    """Equal for snapshots of the same bytes."""
    return manifest.lineage, manifest.version, manifest.kind, manifest.schema_hash, manifest.chunks
