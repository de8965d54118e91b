"""How long the training thread spends in each part of its loop."""

import time

PARTS = ("read", "prepare", "evaluate", "step", "results", "duties")
"""``read``: read, decode, join, and the wait for events. ``prepare``: rows for new ids, copies to the device.
``evaluate``: score by the frozen weights of the window. ``step``: forward, backward, update. ``results``: count scores
and routing. ``duties``: cuts, checkpoints, publications that are waited for. Several ranks also have ``turn``: what
they tell each other, and the wait for the slowest.
"""


class PartTimes:
    """Adds up laps of one clock, so that the parts together are all the time that has passed.

    Attributes:
        seconds: Part → seconds so far.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._last_s = time.perf_counter()

    def lap(self, part: str) -> None:
        """Add the time since the last lap to a part."""
        now_s = time.perf_counter()
        self.seconds[part] += now_s - self._last_s
        self._last_s = now_s
