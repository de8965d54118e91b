"""Configuration of the id table's rows: which ids get one, and when a row is given back.

Importing this does not import torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, Le

from smes.ranges import EventSeconds, PositiveInt, check_ranges

AdmitAfter = Annotated[int, Ge(1), Le(255)]
SharedRows = Annotated[int, Ge(0), Le(2**20)]


@dataclass(frozen=True)
class RowRules:
    """The rules for the rows of one vocabulary.

    Attributes:
        admit_after: An id gets its row in the batch of its n-th sighting. A sighting is one occurrence in an example,
            within a history too. 1: at once.
        shared_rows: Ids without a row of their own share so many rows, by their hash. 0: they read the vocabulary's
            default row, as missing values do.
        expire_after_s: A row is given back when its id was not seen for so many seconds of event time; within 1/64 of
            that time. Null: never.
        budget: So many ids at most have rows; the least recently seen one gives its row to a new id. Null: any number.
    """

    admit_after: AdmitAfter = 1
    shared_rows: SharedRows = 0
    expire_after_s: EventSeconds | None = None
    budget: PositiveInt | None = None

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, slots=True)
class RowCounts:
    """The rows of ids: ``in_use`` is ``born`` less ``expired`` less ``replaced``.

    Attributes:
        in_use: Ids that have a row now.
        born: Rows that ids got.
        expired: Rows given back because their ids were not seen for long.
        replaced: Rows given back because the budget was used up.
        turned_away: New ids that got no row because the budget was used up by ids that had just been seen, each counted
            in every batch that had it.
    """

    in_use: int
    born: int
    expired: int
    replaced: int
    turned_away: int


@dataclass(frozen=True)
class RowsConfig:
    """Which ids get a row of the table, and when a row is given back.

    By default every id gets a row and keeps it. Then the table grows as long as new ids come.

    Attributes:
        admit_after: An id gets its row in the batch of its n-th sighting. A sighting is one occurrence in an example,
            within a history too. 1: at once.
        shared_rows: The ids of a vocabulary that have no row of their own share so many rows, by their hash. 0: they
            read the vocabulary's default row, as missing values do.
        expire_after_s: A row is given back when its id was not seen for so many seconds of event time; within 1/64 of
            that time. Null: never.
        budget: So many ids at most have rows, of all vocabularies that have no rules of their own together; the least
            recently seen one gives its row to a new id. Null: any number.
        counted_sightings: So many sightings of ids without rows are counted at least before the oldest of them are
            forgotten. They take 16 to 32 bytes each, and only if an ``admit_after`` is above 1.
        vocabularies: Vocabulary → its own rules instead of those above. Its rows do not count for the budget above.
    """

    admit_after: AdmitAfter = 1
    shared_rows: SharedRows = 0
    expire_after_s: EventSeconds | None = None
    budget: PositiveInt | None = None
    counted_sightings: Annotated[int, Ge(1), Le(2**30)] = 1_000_000
    vocabularies: dict[str, RowRules] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def common(self) -> RowRules:
        """The rules of every vocabulary that has none of its own."""
        return RowRules(self.admit_after, self.shared_rows, self.expire_after_s, self.budget)

    def rules(self, vocabularies: Iterable[str]) -> list[RowRules]:
        """The rules of some vocabularies.

        Args:
            vocabularies: All vocabularies of the schema.

        Raises:
            ValueError: There are rules for another one.
        """
        names = list(vocabularies)
        for name in self.vocabularies:
            if name not in names:
                raise ValueError(f"rows.vocabularies.{name}: no such vocabulary, expected one of {', '.join(names)}")
        return [self.vocabularies.get(name, self.common) for name in names]

    def pools(self, vocabularies: Iterable[str]) -> list[tuple[list[int], int]]:
        """The vocabularies, by their places, whose rows share a budget, and that budget; the common one comes first."""
        names = list(vocabularies)
        common = [v for v, name in enumerate(names) if name not in self.vocabularies]
        own = [([v], self.vocabularies[name].budget) for v, name in enumerate(names) if name in self.vocabularies]
        return [(places, budget) for places, budget in [(common, self.budget), *own] if budget is not None]

    @property
    def gives_rows_back(self) -> bool:
        """Whether any row is ever given back."""
        rules = (self.common, *self.vocabularies.values())
        return any(rule.budget is not None or rule.expire_after_s is not None for rule in rules)
