"""Ledgers: where every event is. The counts of each one add up at every moment.

A ledger is kept per topic and partition, as one row of :data:`COLUMNS`; the ledgers that people read are sums of rows.
"""

from dataclasses import dataclass

from smes.arrays import I64
from stream.left_out_features import FeatureCounts

READ, USED, HELD, LATE, DUPLICATE, ORPHANED, CORRECTED = range(7)
"""Columns of a partition's ledger. The first counts all events read; each event is also in one of the others."""

COLUMNS = ("read", "used", "held", "late", "duplicate", "orphaned", "corrected")
"""``used``: impressions emitted, feedback attached. ``held``: events that wait. Only feedback is ever orphaned, or
corrected: it came after its task's wait, and is an example of its own.
"""


@dataclass(slots=True)
class JoinLedger:
    """Where every event that the join was given is now. Counts of events."""

    impressions: int = 0
    emitted: int = 0
    impressions_waiting: int = 0
    impressions_late: int = 0
    impressions_duplicate: int = 0
    feedback: int = 0
    attached: int = 0
    feedback_waiting: int = 0
    feedback_late: int = 0
    orphaned: int = 0
    feedback_duplicate: int = 0
    corrected: int = 0

    @classmethod
    def of_counts(cls, impressions: I64, feedback: I64) -> "JoinLedger":
        """The ledger of two rows of counts, int64 [:data:`COLUMNS`] each."""
        shown, outcomes = impressions.tolist(), feedback.tolist()
        return cls(
            impressions=shown[READ],
            emitted=shown[USED],
            impressions_waiting=shown[HELD],
            impressions_late=shown[LATE],
            impressions_duplicate=shown[DUPLICATE],
            feedback=outcomes[READ],
            attached=outcomes[USED],
            feedback_waiting=outcomes[HELD],
            feedback_late=outcomes[LATE],
            orphaned=outcomes[ORPHANED],
            feedback_duplicate=outcomes[DUPLICATE],
            corrected=outcomes[CORRECTED],
        )

    def check(self) -> None:
        """Assert that both equations of :mod:`stream.join.joiner` hold."""
        impressions = self.emitted + self.impressions_waiting + self.impressions_late + self.impressions_duplicate
        feedback = self.attached + self.corrected + self.feedback_waiting
        feedback += self.feedback_late + self.orphaned + self.feedback_duplicate
        assert impressions == self.impressions, f"impression ledger: {impressions} accounted of {self.impressions}"
        assert feedback == self.feedback, f"feedback ledger: {feedback} accounted of {self.feedback}"


@dataclass(frozen=True, slots=True)
class StreamLedger:
    """Where every event read is now. Both equations hold; ``handed_out`` is what the trainer has taken.

    impressions = handed_out + waiting + late + duplicate + dead_lettered
    feedback = attached + corrected + feedback_waiting + feedback_late + orphaned + feedback_duplicate
               + feedback_dead_lettered + feedback_dropped

    Gaps are records that the log no longer holds: they were not read, so they are in neither equation. Unreadable
    records are what the log holds but nobody can read as one of ours; each was read and dead-lettered. So each topic's
    positions, where it has JSON alone and no transactions, have moved on by ``impressions + gaps`` and
    ``feedback + feedback_gaps``.

    Attributes:
        impressions, feedback: Events read. A record that is unreadable, or that is refused as a whole, counts as one
            event, or as its rows where they can be counted.
        handed_out: Impressions of which an example was taken; each counts once, with its first one.
        waiting, feedback_waiting: Impressions in the join or in a batch not yet taken; feedback without impression yet.
        late, feedback_late, duplicate, feedback_duplicate, orphaned, attached, corrected: See
            :mod:`stream.join.joiner`.
        dead_lettered, feedback_dead_lettered: Refused, with a letter each; the unreadable ones are among them.
        feedback_dropped: Of old schemas, for tasks that there are no more (:mod:`smes.schema_change`).
        unknown_fields: Fields of good events that the schema does not know; they were kept out.
        gaps, feedback_gaps: Records passed over because somebody deleted them.
        unreadable, feedback_unreadable: Records in the log that are none of ours.
        features: Look-ups of features that impressions left out.
    """

    impressions: int
    handed_out: int
    waiting: int
    late: int
    duplicate: int
    dead_lettered: int
    feedback: int
    attached: int
    corrected: int
    feedback_waiting: int
    feedback_late: int
    orphaned: int
    feedback_duplicate: int
    feedback_dead_lettered: int
    feedback_dropped: int
    unknown_fields: int
    gaps: int
    feedback_gaps: int
    unreadable: int
    feedback_unreadable: int
    features: FeatureCounts
