"""What the publishing threads of several ranks tell each other, carried by the training threads between two steps.

Rank 0 sends orders, the others send reports. Both are JSON, and empty where there is nothing to say.
"""

from typing import Literal

import msgspec

from feature_store.manifest import Chunk

Kind = Literal["full", "delta", "base"]


class Begin(msgspec.Struct, frozen=True):
    """Upload your part of a cut.

    Attributes:
        upload: Of the publication; each rank adds its number.
        version: The cut's step.
        kind: ``delta``: the last ``deltas`` deltas up to this step, as one; ``full``, ``base``: the view of this step.
        deltas: See above.
    """

    upload: str
    version: int
    kind: Kind
    deltas: int


class Orders(msgspec.Struct, frozen=True):
    """What rank 0 tells the others.

    Attributes:
        begin: Uploads to begin.
        abandon: Uploads that came to nothing, by name: stop, and remove what was uploaded.
        closed: Steps whose views are not needed any more.
    """

    begin: tuple[Begin, ...] = ()
    abandon: tuple[str, ...] = ()
    closed: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.begin or self.abandon or self.closed)


class Report(msgspec.Struct, frozen=True):
    """How an upload of another rank's part ended.

    Attributes:
        upload: Of the publication.
        rows: In the part.
        chunks: Of the part; none if it failed.
        error: Why it failed.
        is_outage: Whether that was because the store gave no answer.
    """

    upload: str
    rows: int = 0
    chunks: tuple[Chunk, ...] = ()
    error: str | None = None
    is_outage: bool = False


class Decision(msgspec.Struct, frozen=True):
    """Which cut rank 0 takes, and so all ranks do.

    Attributes:
        full: Whether it is a full one.
        base: Whether it has a view beside its delta.
        deltas: How many of the deltas before rank 0 still has; no other rank needs more of its own.
        lineage: Under which it is published.
    """

    full: bool
    base: bool
    deltas: int
    lineage: str


class Share(msgspec.Struct, frozen=True):
    """What a cut's manifest says of one rank.

    Attributes:
        positions: Topic → partition → next record to read, of the partitions that the rank owns.
        event_time_ms: Event time of the newest example that the rank trained on; None before the first.
        feedback: Rows of :class:`feature_store.feedback_times.FeedbackTimes` since the last cut.
    """

    positions: dict[str, dict[str, int]]
    event_time_ms: int | None
    feedback: tuple[tuple[int, int, int, int, int], ...]


class Closing(msgspec.Struct, frozen=True):
    """One turn of the end: what rank 0 does.

    Attributes:
        is_over: Whether its publisher is closed.
        published: Whether all was published.
        offers: Whether all ranks take one more cut, a full one.
    """

    is_over: bool
    published: bool
    offers: bool


ORDERS = msgspec.json.Decoder(Orders)
REPORTS = msgspec.json.Decoder(tuple[Report, ...])
DECISION = msgspec.json.Decoder(Decision | None)
SHARE = msgspec.json.Decoder(Share)
CLOSING = msgspec.json.Decoder(Closing)
