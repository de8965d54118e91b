"""How much happened lately: the differences of counts over the last seconds."""

from collections import deque
from collections.abc import Mapping

_OVER_S = 10.0


class RecentCounts:
    """Remembers counts for about ten seconds.

    Args:
        at_s: The time, seconds of a clock that never goes back.
        counts: Name → count then.
    """

    def __init__(self, at_s: float, counts: Mapping[str, float]) -> None:
        self._samples: deque[tuple[float, Mapping[str, float]]] = deque([(at_s, counts)])

    def since(self, at_s: float, counts: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        """Seconds that were looked back, and name → how much more there is than then.

        Args:
            at_s: The time now.
            counts: Name → count now.
        """
        samples = self._samples
        samples.append((at_s, counts))
        while len(samples) > 2 and samples[1][0] <= at_s - _OVER_S:
            samples.popleft()
        then_s, then = samples[0]
        return at_s - then_s, {name: count - then.get(name, 0.0) for name, count in counts.items()}
