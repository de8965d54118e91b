"""The topics of the event log: every process names them from here."""

IMPRESSIONS = "impressions"
"""Items shown to users (:class:`smes.events.ImpressionBlock` on the wire)."""

FEEDBACK = "feedback"
"""Outcomes of impressions (:class:`smes.events.FeedbackBlock` on the wire)."""

DEAD_LETTERS = "dead_letters"
"""Records that could not be used, with topic, partition, offset and reason."""
