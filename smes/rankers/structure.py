"""Which router or group each task has: as the configuration says, or as changes of the schema have left it.

A task that comes later must not move what the tasks before it read, and one that goes must not either. So routers,
groups and experts stay as they are, whichever tasks read them, and a new task of the SMES ranker is a *newcomer*
(:mod:`smes.rankers.sparse.newcomers`). The structure travels with the weights (``dense.structure.*``) once it differs
from the configuration's.

Letters: T tasks, R routers (of the ``home`` ranker: task groups).
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

NEWCOMER = -1
"""In place of a task's router: it reads those of the others by a router of its own."""
_MOST = 1_000_000


@dataclass(frozen=True)
class Structure:
    """Routers and their readers.

    Attributes:
        router_T: The router that each task reads, or :data:`NEWCOMER`. For the ``home`` ranker its group.
        group_R: The group of each router, numbered from 0 without gaps. A router may have no reader any more.
        weight_R: w of stage I for each router, summing to 1.
        own_T: How many experts of its own each newcomer has; 0 for the others.
    """

    router_T: tuple[int, ...]
    group_R: tuple[int, ...]
    weight_R: tuple[float, ...]
    own_T: tuple[int, ...]

    @property
    def founders(self) -> tuple[int, ...]:
        """The tasks that are no newcomers."""
        return tuple(t for t, router in enumerate(self.router_T) if router != NEWCOMER)

    @property
    def newcomers(self) -> tuple[int, ...]:
        """The tasks that are."""
        return tuple(t for t, router in enumerate(self.router_T) if router == NEWCOMER)

    def tensors(self) -> dict[str, Tensor]:
        """What :func:`structure_of` reads."""
        return {
            f.name: torch.tensor(getattr(self, f.name), dtype=_TYPES.get(f.name, torch.int64)) for f in fields(self)
        }


_TYPES = {"weight_R": torch.float32}


def structure_of(tensors: Mapping[str, Tensor], num_tasks: int) -> Structure | None:
    """The structure in some tensors, as they were read; None if there is none in them.

    Args:
        tensors: :meth:`Structure.tensors`, or nothing.
        num_tasks: T.

    Raises:
        ValueError: A tensor is missing, or of another shape, type or range.
    """
    if not tensors:
        return None
    values = {}
    for f in fields(Structure):
        tensor, dtype = tensors.get(f.name), _TYPES.get(f.name, torch.int64)
        length = num_tasks if f.name.endswith("_T") else None
        if tensor is None or tensor.dtype != dtype or tensor.dim() != 1 or length not in (None, len(tensor)):
            what = None if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"tensor structure.{f.name}: {what}, expected {dtype} [{length or 'R'}]")
        values[f.name] = tuple(tensor.tolist())
    structure = Structure(**values)
    routers, groups = len(structure.group_R), set(structure.group_R)
    if (
        not 0 < routers == len(structure.weight_R) <= _MOST
        or groups != set(range(len(groups)))
        or not all(NEWCOMER <= router < routers for router in structure.router_T)
        or not all(0 <= own <= _MOST for own in structure.own_T)
        or not structure.founders
    ):
        raise ValueError("tensors structure.*: values out of range, expected those of a structure")
    return structure
