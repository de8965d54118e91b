"""Where every event is: counts that must add up at every moment."""

from dataclasses import dataclass


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

    def check(self) -> None:
        """Both equations of :mod:`stream.join.joiner` hold."""
        impressions = self.emitted + self.impressions_waiting + self.impressions_late + self.impressions_duplicate
        feedback = self.attached + self.feedback_waiting + self.feedback_late + self.orphaned + self.feedback_duplicate
        assert impressions == self.impressions, f"impression ledger: {impressions} accounted of {self.impressions}"
        assert feedback == self.feedback, f"feedback ledger: {feedback} accounted of {self.feedback}"


@dataclass(frozen=True, slots=True)
class StreamLedger:
    """Where every event read is now; both equations of the design hold, ``trained`` being the trainer's count.

    impressions read = trained + waiting + late + duplicate + dead-lettered
    feedback read = attached + waiting + late + orphaned + duplicate + dead-lettered
    """

    impressions: int
    handed_out: int
    waiting: int
    late: int
    duplicate: int
    dead_lettered: int
    feedback: int
    attached: int
    feedback_waiting: int
    feedback_late: int
    orphaned: int
    feedback_duplicate: int
    feedback_dead_lettered: int
    unknown_fields: int
