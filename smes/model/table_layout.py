"""What one record of the table holds: the weights of all groups of columns side by side, then their accumulators."""

from collections.abc import Sequence
from dataclasses import dataclass

from smes.model.config import AdagradConfig, ModelConfig, OptimizerConfig


@dataclass(frozen=True, slots=True)
class ColumnGroup:
    """Columns of the table that are read together and learn by one rule.

    Attributes:
        name: Of the group, unique in its table.
        columns: How many weights a row has in it, ≥ 1.
        config: The update rule.
    """

    name: str
    columns: int
    config: AdagradConfig

    @property
    def accumulators(self) -> int:
        """How many accumulators a row has for it: one, or one per weight."""
        return 1 if self.config.row_wise else self.columns


def column_groups(model: ModelConfig, optimizer: OptimizerConfig, num_tasks: int) -> list[ColumnGroup]:
    """The groups of a model's table: embeddings, and the linear part's weight for each task; those that it has."""
    groups = [ColumnGroup("embedding", model.table_dim, optimizer.embedding)] if model.table_dim else []
    return [*groups, ColumnGroup("wide", num_tasks, optimizer.wide)] if model.wide else groups


@dataclass(frozen=True, slots=True)
class Place:
    """Where a group's columns are in a record.

    Attributes:
        group: The group.
        weights: Its weights.
        accumulators: Its accumulators.
    """

    group: ColumnGroup
    weights: slice
    accumulators: slice


class RecordLayout:
    """Where each group's columns are in a record.

    Args:
        groups: In the order in which the record holds them, at least one.

    Attributes:
        places: By the group's name, in the order of the groups.
        num_weights: Weights of all groups; a record begins with them.
        width: Floats of a record.

    Raises:
        ValueError: No group, or two of one name.
    """

    def __init__(self, groups: Sequence[ColumnGroup]) -> None:
        if len({group.name for group in groups}) != len(groups) or not groups:
            raise ValueError(f"groups of a table: {[group.name for group in groups]}, expected distinct names, ≥ 1")
        self.num_weights = sum(group.columns for group in groups)
        self.places: dict[str, Place] = {}
        weight, accumulator = 0, self.num_weights
        for group in groups:
            weights = slice(weight, weight + group.columns)
            accumulators = slice(accumulator, accumulator + group.accumulators)
            self.places[group.name] = Place(group, weights, accumulators)
            weight, accumulator = weights.stop, accumulators.stop
        self.width = accumulator
