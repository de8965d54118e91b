"""What is to be said of each version beside its name: current, in service, pinned, held, rolled back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from feature_store.manifest import Manifest, member
from smes.errors import SnapshotError, SnapshotNotFound

if TYPE_CHECKING:
    from feature_store.snapshots import SnapshotStore


@dataclass(frozen=True, slots=True)
class ServingMarks:
    """What a store says of its versions, at one moment.

    Attributes:
        current: ``lineage:version`` of the current snapshot; None: there is none.
        serves: The same of what scorers are to serve; None: nothing, or it cannot be read.
        pinned: Whether that stays whatever is published.
        rolled_back: What was rolled back, and not put into service by a decision since.
        problems: What is broken, in words.
    """

    current: str | None
    serves: str | None
    pinned: bool
    rolled_back: frozenset[str]
    problems: tuple[str, ...]

    @classmethod
    def of_store(cls, store: "SnapshotStore") -> "ServingMarks":
        """Read them.

        Raises:
            FeatureStoreError, FeatureStoreUnavailable: Redis refused, or gave no answer in time.
        """
        problems: list[str] = []
        current, serves, pinned = store.pointer(), None, False
        if store.pointer_problem is not None:
            problems.append(store.pointer_problem)
        try:
            served = store.to_serve()
        except SnapshotNotFound:
            served = None
        except SnapshotError as error:
            served = None
            problems.append(str(error))
        else:
            decision = store.pins.last
            pinned = decision is not None and decision.pins
        if served is not None:
            serves = member(served.lineage, served.version)
        return cls(current, serves, pinned, frozenset(store.rolled_back()), tuple(problems))

    def of(self, manifest: Manifest, *, is_held: bool) -> Sequence[str]:
        """The marks of one version, in words.

        Args:
            manifest: Its own.
            is_held: Whether it is among :meth:`feature_store.snapshots.SnapshotStore.held`.
        """
        name = member(manifest.lineage, manifest.version)
        marks = []
        if name == self.current:
            marks.append("current")
        if name == self.serves and self.pinned:
            marks.append("pinned")
        elif name == self.serves != self.current:
            marks.append("in service")
        if name in self.rolled_back:
            marks.append("rolled back")
        if manifest.held is not None:
            marks.append(f"{'held' if is_held else 'promoted, was held'}: {manifest.held}")
        return marks
