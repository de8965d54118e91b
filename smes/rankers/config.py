"""Shapes of the dense rankers, whose experts all run, and the task groups that a configuration declares.

Importing this does not import torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import MinLen

from smes.ranges import NonNegativeInt, PositiveInt, check_ranges
from smes.schema import Schema

Dims = tuple[PositiveInt, ...]
"""Widths of a network's layers; empty for no network."""
ExpertDims = Annotated[Dims, MinLen(1)]
"""Widths of an expert's layers, at least one."""
DenseNorm = Literal["layer", "batch"]
"""Norms of a dense expert; the modules are in :data:`smes.rankers.dense_experts.NORMS`."""


@dataclass(frozen=True)
class SharedBottomConfig:
    """Shape of the shared-bottom ranker.

    Attributes:
        dims: Widths of the layers; the last is H. The default has about as many weights as SMES in the paper's form.
    """

    dims: ExpertDims = (256, 64)

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class MmoeConfig:
    """Shape of the MMoE ranker. The default has the encoder and the experts of SMES in the paper's form.

    Attributes:
        num_experts: Number of experts. All tasks share them, and all of them run.
        encoder_dims: Widths of an encoder before experts and gates; the paper has none.
        expert_dims: Widths of an expert's layers.
    """

    num_experts: PositiveInt = 16
    encoder_dims: Dims = (128,)
    expert_dims: ExpertDims = (64,)

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class PleConfig:
    """Shape of the PLE ranker. The default, with eight tasks, has about as many weights as SMES in the paper's form.

    Attributes:
        num_levels: Extraction levels; 1 is the paper's CGC.
        num_shared: Experts of each level that all tasks use.
        num_specific: Experts of each level that one task has for itself.
        encoder_dims: Widths of an encoder before the first level; the paper has none.
        expert_dims: Widths of an expert's layers.
    """

    num_levels: PositiveInt = 2
    num_shared: PositiveInt = 4
    num_specific: PositiveInt = 1
    encoder_dims: Dims = (128,)
    expert_dims: ExpertDims = (64,)

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class HomeConfig:
    """Shape of the HoME ranker.

    Attributes:
        groups: Task groups: names of tasks by the name of their group. Tasks named in no group form one more group.
            Empty: the paper's two groups, ``watch`` (regression tasks, and tasks with ``view``, ``watch`` or ``play``
            in their name) and ``interaction`` (the rest).
        experts_per_group: M, the experts in each group of experts, in both layers.
        feature_gates: L, the low-rank maps of a feature gate (2 was the paper's best); 0 for no feature gates.
        self_gates: Whether each group's own experts are added to its mixture, as a residual.
        norm: Norm of each expert. ``batch`` is the paper's; with ``layer`` the score of an instance does not depend on
            the batch that it is in.
        encoder_dims: Widths of an encoder before the meta layer; the paper has none.
        expert_dims: Widths of an expert's layers, in both layers.
    """

    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    experts_per_group: PositiveInt = 1
    feature_gates: NonNegativeInt = 2
    self_gates: bool = True
    norm: DenseNorm = "layer"
    encoder_dims: Dims = (128,)
    expert_dims: ExpertDims = (64,)

    def __post_init__(self) -> None:
        check_ranges(self)
        check_groups("HomeConfig.groups", self.groups)


_WATCH_WORDS = ("view", "watch", "play")


def check_groups(key: str, groups: Mapping[str, Sequence[str]]) -> None:
    """Refuse a group without a task, and a task that is named twice.

    Args:
        key: The configuration key, for the message.
        groups: Names of tasks by the name of their group.

    Raises:
        ValueError: With key, value and what was expected.
    """
    named = [name for names in groups.values() for name in names]
    if len(set(named)) < len(named) or not all(groups.values()):
        raise ValueError(f"{key}: {dict(groups)}, expected at least one task in each and no task twice")


def task_groups(key: str, schema: Schema, groups: Mapping[str, Sequence[str]]) -> tuple[int, ...]:
    """The group of each task, numbered from 0 in the order in which tasks first name them (HoME, arXiv 2408.05430).

    Args:
        key: The configuration key, for the message.
        schema: Gives the tasks.
        groups: As in :attr:`HomeConfig.groups`.

    Raises:
        ValueError: A group names a task that the schema does not have.
    """
    tasks = {task.name for task in schema.tasks}
    of_task = {name: group for group, names in groups.items() for name in names}
    if unknown := sorted(of_task.keys() - tasks):
        raise ValueError(f"{key}: unknown tasks {unknown}, expected names among {sorted(tasks)}")
    if not groups:
        of_task = {
            task.name: "watch"
            for task in schema.tasks
            if task.kind == "regression" or any(word in task.name for word in _WATCH_WORDS)
        }
    named = [of_task.get(task.name) for task in schema.tasks]
    numbers = {group: number for number, group in enumerate(dict.fromkeys(named))}
    return tuple(numbers[group] for group in named)
