"""What can go wrong in operation. A wrong argument is a ``ValueError`` that names the field; nothing is sent then."""

from smes.errors import EventLogError, SmesError


class BufferFull(EventLogError):
    """The buffer of events had no room within the time that a call may wait; the event was not taken."""


class DeliveryFailed(EventLogError):
    """Events were not acknowledged by the event log; some of them may be there nevertheless."""


class ScorerRefused(SmesError):
    """The scorer answered with an error that trying again does not mend. The message has its status and its words."""


class ScorerUnavailable(SmesError):
    """No answer of the scorer within the deadline."""
