"""Which tasks of a log are dense and which are rare: from their base rates in the log, not from their names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.task_figures import RARE_BELOW


@dataclass(frozen=True)
class TaskSplit:
    """The binary tasks of a log.

    Attributes:
        names: In the order of the schema.
        examples: Labelled ones, by task.
        positives: By task.
    """

    names: tuple[str, ...]
    examples: tuple[int, ...]
    positives: tuple[int, ...]

    @classmethod
    def of(cls, names: tuple[str, ...], facts: Mapping[str, Mapping[str, Any]]) -> "TaskSplit":
        """From what a run has written down: task → its figures."""
        counted = [facts[name] for name in names]
        return cls(names, tuple(one["examples"] for one in counted), tuple(one["positives"] for one in counted))

    @property
    def base_rates(self) -> tuple[float, ...]:
        """0 for a task without a label."""
        return tuple(p / max(n, 1) for p, n in zip(self.positives, self.examples, strict=True))

    @property
    def defined(self) -> tuple[int, ...]:
        """Numbers of the tasks with both classes. The others have no AUC: they are neither dense nor rare."""
        return tuple(t for t, (p, n) in enumerate(zip(self.positives, self.examples, strict=True)) if 0 < p < n)

    @property
    def dense(self) -> tuple[int, ...]:
        """Numbers of the tasks with a base rate of at least 1 %."""
        return tuple(t for t in self.defined if self.base_rates[t] >= RARE_BELOW)

    @property
    def rare(self) -> tuple[int, ...]:
        """Numbers of the tasks with a base rate below 1 %."""
        return tuple(t for t in self.defined if self.base_rates[t] < RARE_BELOW)

    def named(self, tasks: tuple[int, ...]) -> tuple[str, ...]:
        return tuple(self.names[t] for t in tasks)
