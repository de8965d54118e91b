"""Configuration of the replay. Every command reads it, so it imports none of what a replay needs."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt, Le

from smes.ranges import PositiveFloat, PositiveInt, Seconds, Share, check_ranges


@dataclass(frozen=True)
class ReplayConfig:
    """How a log is replayed.

    Attributes:
        speed: Event time per wall time. 1 is real time, 60 replays an hour in a minute, and ``max`` is as fast as
            possible.
        rate: Events (impressions and feedback) per second of wall time, evenly spaced. Replaces ``speed``.
        seed: Seed of the feedback delays.
        late_share: Share of the feedback that misses its attribution window on purpose.
        codec: Wire form of the events.
        by_request: Whether what impressions of a request share is sent once; in JSON as one record. The log must have
            ids of requests (``log.request_id`` in the schema file); an impression without one is sent by itself.
        slice_s: Wall time that one append covers, in seconds, unless the speed is ``max``.
        max_slice_events: Most events of one append.
        max_slice_bytes: Most bytes of one append, as the events lie in memory; at least one event is appended.
        outage_timeout_s: How long an append is tried while the event log is away, if the event log's own
            ``outage_timeout_s`` is not longer: a replay that ends has to begin anew.
    """

    speed: PositiveFloat | Literal["max"] = "max"
    rate: PositiveFloat | None = None
    seed: int = 0
    late_share: Share = 0.0
    codec: Literal["json", "arrow"] = "arrow"
    by_request: bool = False
    slice_s: Annotated[float, Gt(0), Le(1)] = 0.05
    max_slice_events: PositiveInt = 8192
    max_slice_bytes: PositiveInt = 4 * 2**20
    outage_timeout_s: Seconds = 600.0

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.rate is not None and self.speed != "max":
            raise ValueError(f"ReplayConfig.rate: {self.rate} beside speed {self.speed}, expected one of them")
