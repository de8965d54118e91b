"""A snapshot that the ranks of a training write together: each uploads a part, and rank 0 commits them all at once.

Rank 0 publishes as one process does (:meth:`feature_store.snapshots.SnapshotStore.publish`), but has the other ranks
upload their parts meanwhile, and waits for them before it commits. How they hear of it is not the store's business.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from feature_store.manifest import Chunk, Part


@dataclass(frozen=True, slots=True)
class UploadedPart:
    """What a rank has uploaded.

    Attributes:
        chunks: Its chunks, in order.
        rows: Rows that they hold.
    """

    chunks: tuple[Chunk, ...]
    rows: int

    @property
    def part(self) -> Part:
        """As a manifest has it."""
        return Part(len(self.chunks), self.rows)


class OtherParts(Protocol):
    """The other ranks, in one publication of rank 0."""

    @property
    def count(self) -> int:
        """How many there are, ≥ 1."""

    def begin(self, upload: str) -> None:
        """Have rank k upload its part under the name ``part_of(upload, k)``; returns at once."""

    def wait(self) -> Sequence[UploadedPart]:
        """What ranks 1, 2, … have uploaded, in this order.

        Raises:
            FeatureStoreUnavailable, SnapshotError: A rank could not; the message names it.
        """

    def abandon(self) -> None:
        """Have them stop and remove what they have uploaded; returns at once."""
