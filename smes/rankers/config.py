"""Shapes of the rankers whose experts all run: SMES's rivals. Importing this does not import torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from smes.schema import Schema

_NORMS = ("batch", "layer")


@dataclass(frozen=True)
class SharedBottomConfig:
    """Shape of the shared-bottom ranker.

    Attributes:
        dims: Widths of the layers; the last is H. The default has about the weights of SMES's default.
    """

    dims: tuple[int, ...] = (256, 64)

    def __post_init__(self) -> None:
        check_dims("shared_bottom", self, needed=("dims",))


@dataclass(frozen=True)
class MmoeConfig:
    """Shape of the MMoE ranker. By default the encoder and the experts of SMES's default, all of them executed.

    Attributes:
        num_experts: Experts, all shared by all tasks.
        encoder_dims: Widths of an encoder before experts and gates; none in the paper.
        expert_dims: Widths of an expert's layers.
    """

    num_experts: int = 16
    encoder_dims: tuple[int, ...] = (128,)
    expert_dims: tuple[int, ...] = (64,)

    def __post_init__(self) -> None:
        check_counts("mmoe", self, num_experts=1)
        check_dims("mmoe", self, optional=("encoder_dims",), needed=("expert_dims",))


@dataclass(frozen=True)
class PleConfig:
    """Shape of the PLE ranker. By default, with eight tasks, about the weights of SMES's default.

    Attributes:
        num_levels: Extraction levels; 1 is the paper's CGC.
        num_shared: Experts of a level that all tasks use.
        num_specific: Experts of a level that each task has for itself.
        encoder_dims: Widths of an encoder before the first level; none in the paper.
        expert_dims: Widths of an expert's layers.
    """

    num_levels: int = 2
    num_shared: int = 4
    num_specific: int = 1
    encoder_dims: tuple[int, ...] = (128,)
    expert_dims: tuple[int, ...] = (64,)

    def __post_init__(self) -> None:
        check_counts("ple", self, num_levels=1, num_shared=1, num_specific=1)
        check_dims("ple", self, optional=("encoder_dims",), needed=("expert_dims",))


@dataclass(frozen=True)
class HomeConfig:
    """Shape of the HoME ranker.

    Attributes:
        groups: Task groups: the names of the tasks of each. A task named in none forms, with the others left over, a
            group of its own. Empty: the paper's two, ``watch`` (regression tasks, and those with ``view``, ``watch``
            or ``play`` in their name) and ``interaction`` (the rest).
        experts_per_group: M, experts in each group of experts, in both layers.
        feature_gates: L, low-rank maps of a feature gate (2 was the paper's best); 0 for no feature gates.
        self_gates: Whether each group's own experts are added to its mixture, as a residual.
        norm: Of each expert: ``batch`` is the paper's; ``layer`` scores an instance the same whatever batch it is in.
        encoder_dims: Widths of an encoder before the meta layer; none in the paper.
        expert_dims: Widths of an expert's layers, in both layers.
    """

    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    experts_per_group: int = 1
    feature_gates: int = 2
    self_gates: bool = True
    norm: str = "layer"
    encoder_dims: tuple[int, ...] = (128,)
    expert_dims: tuple[int, ...] = (64,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", check_groups("home", self.groups))
        check_counts("home", self, experts_per_group=1, feature_gates=0)
        check_dims("home", self, optional=("encoder_dims",), needed=("expert_dims",))
        if self.norm not in _NORMS:
            raise ValueError(f"home.norm: {self.norm!r}, expected one of {list(_NORMS)}")


def check_dims(ranker: str, config: object, *, optional: tuple[str, ...] = (), needed: tuple[str, ...] = ()) -> None:
    """Refuse layer widths below 1, and no layer where one is needed.

    Raises:
        ValueError: With ranker, key, value and what was expected.
    """
    for name in (*optional, *needed):
        dims = getattr(config, name)
        if any(d < 1 for d in dims) or (name in needed and not dims):
            many = "one or more" if name in needed else "no or more"
            raise ValueError(f"{ranker}.{name}: {list(dims)}, expected {many} positive widths")


def check_counts(ranker: str, config: object, **least: int) -> None:
    """Refuse numbers below their least value.

    Raises:
        ValueError: With ranker, key, value and what was expected.
    """
    for name, low in least.items():
        if getattr(config, name) < low:
            raise ValueError(f"{ranker}.{name}: {getattr(config, name)}, expected at least {low}")


# TODO(merge) was smes.task_groups: Task groups: which tasks belong together (HoME, arXiv 2408.0

_WATCH_WORDS = ("view", "watch", "play")


def check_groups(ranker: str, groups: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """The groups as a configuration keeps them: lists, as JSON and YAML have them, become tuples.

    Args:
        ranker: Whose configuration, for the message.
        groups: Names of tasks by the name of their group.

    Raises:
        ValueError: A group without a task, or a task named twice.
    """
    named = [name for names in groups.values() for name in names]
    if len(set(named)) < len(named) or not all(groups.values()):
        raise ValueError(f"{ranker}.groups: {dict(groups)}, expected at least one task in each and no task twice")
    return {group: tuple(names) for group, names in groups.items()}


def task_groups(ranker: str, schema: Schema, groups: Mapping[str, Sequence[str]]) -> tuple[int, ...]:
    """The group of each task, numbered from 0 in the order in which tasks first name them.

    Args:
        ranker: Whose configuration, for the message.
        schema: Its tasks.
        groups: Names of tasks by the name of their group; tasks named in none form, together, one more. Empty: HoME's
            two, ``watch`` (regression tasks, and those with ``view``, ``watch`` or ``play`` in their name) and
            ``interaction`` (the rest).

    Raises:
        ValueError: A group names a task that the schema does not have.
    """
    tasks = {task.name for task in schema.tasks}
    of_task = {name: group for group, names in groups.items() for name in names}
    if unknown := sorted(of_task.keys() - tasks):
        raise ValueError(f"{ranker}.groups: unknown tasks {unknown}, expected names among {sorted(tasks)}")
    if not groups:
        of_task = {
            task.name: "watch"
            for task in schema.tasks
            if task.kind == "regression" or any(word in task.name for word in _WATCH_WORDS)
        }
    named = [of_task.get(task.name) for task in schema.tasks]
    numbers = {group: number for number, group in enumerate(dict.fromkeys(named))}
    return tuple(numbers[group] for group in named)
