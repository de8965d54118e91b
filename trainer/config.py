"""Configuration of the training process."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt, Le

from smes.arm_names import EXPECTED, MAIN, is_arm_name
from smes.ranges import (
    EventSecondsOrZero,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Seconds,
    SecondsOrZero,
    check_ranges,
)
from smes_io.secrets import SecretPlace

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CheckpointConfig:
    """Where checkpoints are kept, and how often one is written.

    Attributes:
        directory: Folder of the checkpoints, created if missing. None: the trainer keeps none and starts anew.
        interval_s: Seconds between checkpoints, > 0, on the monotonic clock; a clean stop always writes one.
        first_interval_s: A process writes its first checkpoint after its first step, the next one so many seconds after
            the start, > 0, and each later one after twice as long, until ``interval_s`` is reached. So a trainer that
            dies again and again keeps about half of what it did each time.
        keep: How many of the newest are kept, ≥ 1. Damaged ones do not count.
    """

    directory: Path | None = None
    interval_s: Seconds = 30.0
    first_interval_s: Seconds = 1.0
    keep: PositiveInt = 2

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class EvaluationConfig:
    """Windows that one frozen copy of the weights scores.

    Attributes:
        window_s: Event time that a window covers at most, seconds, ≥ 0.001; periods are counted from 1970-01-01 UTC.
            If the schema has a history, a whole part of its window. None: that window, or a day without a history.
        window_examples: Most examples in a window, ≥ 1; bounds memory and checkpoints (about 100 bytes an example).
            Early windows are shorter: none is longer than all that was trained on before it began. None: 16,384, or
            262,144 if the schema has a history, whose windows end by time, whatever the traffic.
        arm: The scorer's arm by which this trainer's snapshots answer. Scores that an impression was served with by it,
            or without an arm, count instead of ours; those that another arm served do not.
    """

    window_s: Annotated[float, Ge(1e-3), Le(1_000_000_000)] | None = None
    window_examples: PositiveInt | None = None
    arm: str = MAIN

    def __post_init__(self) -> None:
        check_ranges(self)
        if not is_arm_name(self.arm):
            raise ValueError(f"EvaluationConfig.arm: {self.arm!r}, expected {EXPECTED}")


@dataclass(frozen=True)
class GateConfig:
    """The publish gate: which cuts are published, and what happens when one is not. See :mod:`trainer.gate`.

    Attributes:
        enabled: Whether cuts are judged. Without, every cut is published.
        sample_share: Share of the impressions that the version in service scores, too, > 0, at most 1. Together with
            the model's size it sets what the gate costs.
        stretch_examples: Sampled examples that are kept to judge by, ≥ 256; about 20 bytes a task each. Differences are
            looked for in the newest 64th, 16th, quarter, and in all of them.
        warm_up_examples: Sampled examples before a stream counts as known, ≥ 1. Until then the calibration and the
            stream are not judged.
        z: Standard errors beyond which a difference counts, ≥ 2. A difference has to exceed a margin, too.
        max_loss: Margin of the loss: a candidate may be worse than the version in service by this share, ≥ 0.
        max_auc_loss: Margin of the AUC, ≥ 0.
        max_calibration: Margin of the calibration: Σ label against Σ score, as odds (regression: as a ratio), may
            differ by this factor, > 1.
        max_base_rate_ratio: Likewise for labels and scores against the base rate of all that went before, > 1.
        max_shift: The stream is suspect where the labels differ by more than this factor, likewise, from what the
            version in service expected, > 1.
        max_slope_drop: The stream is suspect where the slope of the labels on that version's scores, usually about 1,
            is lower than before by more than this, > 0. Flipped labels lower it by 2.
        max_user_share: The stream is suspect where one user has more than this share of the examples, or of a task's
            positives, and thrice what was usual, > 0.
        max_range: A numeric value is far out of its range where it lies outside of what was seen by more than so many
            times the range's width, > 0.
        max_odd_share: The stream is suspect where more than this share of the examples have such values, > 0.
        max_refusals: So many refused cuts in a row are an alarm, ≥ 1.
        then: What follows an alarm: ``hold``, the version in service stays, or ``go_back``, the weights and optimisers
            go back to the last cut that passed, too.
        sift: Whether, while the stream is suspect, single examples teach nothing that the version in service finds next
            to impossible, nor those of a user who floods the stream, nor labels of a task that is suspect as a whole.
            With ``go_back`` the weights then go back at once, and learn on from the rest.
        accept_after_s: Event time, seconds, ≥ 0, after which a stream that stays different is accepted, if the
            candidate fits it. None: only ``smes snapshots promote`` accepts it.
        held_interval_s: A refused cut is uploaded to be looked at, at most one in so many seconds, ≥ 0.
    """

    enabled: bool = False
    sample_share: Annotated[float, Gt(0), Le(1)] = 0.25
    stretch_examples: Annotated[int, Ge(256)] = 8192
    warm_up_examples: PositiveInt = 4096
    z: Annotated[float, Ge(2)] = 5.0
    max_loss: NonNegativeFloat = 0.02
    max_auc_loss: NonNegativeFloat = 0.005
    max_calibration: Annotated[float, Gt(1)] = 2.0
    max_base_rate_ratio: Annotated[float, Gt(1)] = 3.0
    max_shift: Annotated[float, Gt(1)] = 1.5
    max_slope_drop: PositiveFloat = 0.5
    max_user_share: PositiveFloat = 0.02
    max_range: PositiveFloat = 10.0
    max_odd_share: PositiveFloat = 0.005
    max_refusals: PositiveInt = 5
    then: Literal["hold", "go_back"] = "hold"
    sift: bool = True
    accept_after_s: EventSecondsOrZero | None = 3600.0
    held_interval_s: SecondsOrZero = 60.0

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class HttpConfig:
    """Where the trainer says how it is: ``/metrics``, ``/v1/stats``, ``/v1/history`` and ``/health/…``.

    Attributes:
        host: Address to listen on.
        port: TCP port, 0 for any free one. None: the trainer does not listen.
        tokens: Where the bearer tokens are that callers must show, as for ``scorer.tokens``. Null: everybody may ask.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Ge(0), Le(65535)] | None = None
    tokens: SecretPlace | None = None

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class HistoryConfig:
    """The run's metrics over time: lines of JSON in files of a folder, see :mod:`trainer.history`.

    A line is written when a window of the evaluation has closed (``trainer.evaluation``). The keys below add others.

    Attributes:
        directory: Folder of the files, created if missing. None: no history is written.
        every_s: A line is also written so many seconds after the one before, > 0, if something was trained on since.
            None: not by the clock; then the lines depend on the log alone.
        every_examples: A line is also written after so many impressions since the one before, ≥ 1. None: not by count.
        keep: So many of the newest lines are kept at least, ≥ 1, and at most a quarter more.
    """

    directory: Path | None = None
    every_s: Seconds | None = 60.0
    every_examples: PositiveInt | None = None
    keep: PositiveInt = 20_000

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class TrainerConfig:
    """The training process.

    Attributes:
        device: ``auto`` takes CUDA if it is usable, else the CPU.
        seed: Seed of the first weights, dense ones and embedding rows.
        threads: Threads of torch on the CPU, ≥ 1. One is the default: where other processes use the cores, a second
            thread makes a step many times slower (docs/experiments/speed.md). None leaves torch's choice, one thread
            per core. A restart is the same bit for bit only with the same number.
        cpu_precision: How a step of a dense ranker multiplies on the CPU: ``fp32``, or ``bf16``, with float32 sums
            (docs/experiments/performance.md). Weights, optimisers, and what is served are float32 in either case. A GPU
            always trains in bfloat16; ``smes``, whose products are small, never does on the CPU.
        snapshot_interval_s: Seconds between cuts for serving, > 0, on the monotonic clock.
        lease_s: The lease that lets one trainer publish in a namespace ends so many seconds after it was last renewed,
            0.5 … 3600. A trainer that takes the place of a killed one waits so long at most.
        rank_timeout_s: Where several ranks train together, a rank that does not answer for so many seconds counts as
            dead, 1 … 86400. It must be longer than an event log may be away (``event_log.outage_timeout_s``) and than a
            checkpoint takes.
        max_failed_steps: So many steps in a row whose loss or gradients are not finite stop the trainer, ≥ 1. Such a
            step changes nothing; its examples are dead-lettered.
        steps_before_replacing: Steps of weights that were started anew before they replace a model in service, ≥ 1.
        checkpoint: Checkpoints on disk.
        evaluation: Windows of frozen weights.
        gate: Which cuts are published.
        http: Metrics and health.
        history: Metrics over time.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    threads: PositiveInt | None = 1
    cpu_precision: Literal["fp32", "bf16"] = "fp32"
    snapshot_interval_s: Seconds = 1.0
    lease_s: Annotated[float, Ge(0.5), Le(3600)] = 5.0
    rank_timeout_s: Annotated[float, Ge(1), Le(86_400)] = 600.0
    max_failed_steps: PositiveInt = 5
    steps_before_replacing: PositiveInt = 1
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    http: HttpConfig = field(default_factory=HttpConfig)
    history: HistoryConfig = field(default_factory=HistoryConfig)

    def __post_init__(self) -> None:
        check_ranges(self)

    def open_device(self) -> "torch.device":
        """The torch device that ``device`` names; also sets torch's number of threads.

        Raises:
            ValueError: ``cuda`` without a usable CUDA device.
        """
        import torch  # here, because most commands that read a configuration do not need it

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        usable = torch.cuda.is_available()
        if self.device == "cuda" and not usable:
            raise ValueError("trainer.device: 'cuda', expected auto or cpu: torch finds no usable CUDA device")
        return torch.device("cuda" if usable and self.device != "cpu" else "cpu")
