"""Configuration of the stream: how events are read, joined and cut into mini-batches.

A module of its own because it imports neither codecs nor compiled loops: a process that has the configuration need not
have the stream.
"""

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, Le

from smes.ranges import EventSeconds, EventSecondsOrZero, PositiveInt, Seconds, check_ranges
from stream.join.waits import Correction, Wait


@dataclass(frozen=True)
class JoinConfig:
    """How long the join waits and remembers.

    Attributes:
        allowed_lateness_s: How far an event may lie behind the others of its partition and still be in time, seconds of
            event time. Every example is delayed by as much.
        remember_s: How long an impression id is remembered after its emission, seconds of event time. Within that time
            a second copy is a duplicate and feedback is late. After it a copy is late and feedback is orphaned.
        vouchers: A partition has reached a time when so many of its last ``2 * vouchers - 1`` events have, each of
            another impression: fewer events with a wrong clock do nothing. Every example waits until each partition has
            had ``vouchers - 1`` more events, or is idle. With 1, the latest event counts alone.
        wait: Task → how long an impression waits before it is trained on for that task: until the attribution window
            has closed (``window``), not at all (``immediate``), or seconds of event time. ``default`` stands for every
            task that is not named. Feedback that comes after the wait is trained on when it comes.
        correction: How the loss makes up for the negatives that stand for positives still to come
            (:mod:`smes.model.delayed_feedback`): ``es_dfm``, ``fnw``, or ``none``, for comparison. Where every task
            waits for its window, there are none.
    """

    allowed_lateness_s: EventSecondsOrZero = 1.0
    remember_s: EventSecondsOrZero = 600.0
    vouchers: Annotated[int, Ge(1), Le(64)] = 4
    wait: dict[str, Wait] = field(default_factory=lambda: {"default": "window"})
    correction: Correction = "es_dfm"

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class MiniBatchConfig:
    """Bounds of a mini-batch.

    Attributes:
        size: Most examples to train on in a batch. It may hold as many rows of kind ``CLOSING`` beside them.
        max_age_s: Most event time between when the first and the last example of a batch were due, seconds. A batch
            that the stream has left behind by this much is handed out however small.
        max_wait_s: Longest time, by the clock on the wall, that an example waits for its batch to become full, seconds.
            Null: for ever, so that batches depend on the log alone. Backtests, which read no live log, never wait.
    """

    size: PositiveInt = 256
    max_age_s: EventSeconds = 3600.0
    max_wait_s: Seconds | None = 0.5

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class StreamConfig:
    """How events become mini-batches.

    Attributes:
        join: How long to wait and to remember.
        batch: Bounds of a mini-batch.
        events_per_read: About how many events one read returns; bounds memory when catching up.
        idle_after_s: The watermark no longer waits for a partition that has had nothing new for this long, wall clock.
            What is appended there later, with event times that the other partitions have left behind, may be late.
        max_future_s: An event is refused if its time lies more than this after both its arrival in the log and the
            reader's clock, seconds; one more than a day after the reader's clock is refused in any case.
        metadata_refresh_s: How often the log is asked what may have changed: partitions that were added, which are then
            read from their beginning, and topics that were made anew.
        old_schemas: Schema files of earlier schemas whose events are still read: the change-over from one schema to the
            next. An event says by its header ``schema`` which one it was made with. Values of features, and feedback of
            tasks, that there are no more are left out and counted.
        features_from_store: Whether an impression that leaves out all features of its user, or of its item, is trained
            on with those that the feature store had for it at its time.
    """

    join: JoinConfig = field(default_factory=JoinConfig)
    batch: MiniBatchConfig = field(default_factory=MiniBatchConfig)
    events_per_read: PositiveInt = 16_384
    idle_after_s: Seconds = 2.0
    max_future_s: EventSecondsOrZero = 300.0
    metadata_refresh_s: Seconds = 5.0
    old_schemas: tuple[str, ...] = ()
    features_from_store: bool = True

    def __post_init__(self) -> None:
        check_ranges(self)
