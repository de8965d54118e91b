"""How long each task waits before an impression is trained on for it, and what follows from that.

Tasks with the same wait share a *stage*. An impression becomes one example at each stage, with labels of that stage's
tasks alone. Letters: T tasks, G stages.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

from smes.arrays import I64, Bool
from smes.ranges import EventSeconds
from smes.schema import Schema, Task

Wait = Literal["immediate", "window"] | EventSeconds
Correction = Literal["es_dfm", "fnw", "none"]
DEFAULT = "default"
"""The key that stands for every task that is not named."""


class Stages(NamedTuple):
    """What the join's loops need to know of the tasks.

    Attributes:
        window_ms: int64 [T], attribution windows.
        wait_ms: int64 [G], ascending and distinct.
        of_task: int64 [T], each task's stage.
        is_binary: bool [T].
        positives_follow: bool [T], whether a positive always comes as a correction, never at the stage itself.
        corrects: bool [T], whether the task's negatives stand for positives that are still to come: it is binary and
            does not wait for its window.
        lateness_ms: The allowed lateness.
        is_whole: Whether one example with all labels is everything that comes of an impression.
    """

    window_ms: I64
    wait_ms: I64
    of_task: I64
    is_binary: Bool
    positives_follow: Bool
    corrects: Bool
    lateness_ms: int
    is_whole: bool


def stages_of(schema: Schema, wait: Mapping[str, Wait], correction: Correction, lateness_ms: int) -> Stages:
    """Group the tasks by their wait.

    Tasks that wait for their windows come together, when the longest of these windows closes. A wait of seconds that
    is no shorter than its task's window means the window.

    Raises:
        ValueError: ``wait`` names a task that the schema does not have.
    """
    names = {task.name for task in schema.tasks}
    if unknown := sorted(wait.keys() - names - {DEFAULT}):
        raise ValueError(
            f"stream.join.wait: unknown tasks {unknown}, expected {DEFAULT!r} or names among {sorted(names)}"
        )
    waits_ms = [_wait_ms(task, wait.get(task.name, wait.get(DEFAULT, "window"))) for task in schema.tasks]
    window_ms = np.array([task.window_ms for task in schema.tasks], np.int64)
    waits_for_window = np.array([wait_ms is None for wait_ms in waits_ms])
    longest_ms = int(window_ms[waits_for_window].max(initial=0))
    wait_ms, of_task = np.unique(
        np.array([longest_ms if ms is None else ms for ms in waits_ms], np.int64), return_inverse=True
    )
    is_binary = np.array([task.kind == "binary" for task in schema.tasks])
    corrects = is_binary & ~waits_for_window
    return Stages(
        window_ms=window_ms,
        wait_ms=wait_ms,
        of_task=of_task.astype(np.int64),
        is_binary=is_binary,
        positives_follow=corrects & (correction == "fnw"),
        corrects=corrects,
        lateness_ms=lateness_ms,
        is_whole=bool(waits_for_window.all()),
    )


def described(stages: Stages) -> I64:
    """What stages are made of: each task's wait, and whether its positives always follow. int64 [T, 2]."""
    return np.stack([stages.wait_ms[stages.of_task], stages.positives_follow], axis=1)


def _wait_ms(task: Task, wait: Wait) -> int | None:
    """The wait in milliseconds; None: until the window has closed."""
    if wait == "window":
        return None
    wait_ms = 0 if isinstance(wait, str) else round(wait * 1000)
    return None if wait_ms >= task.window_ms else wait_ms
