"""Configuration of the training process."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Le

from smes.ranges import PositiveFloat, PositiveInt, check_ranges

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
    interval_s: PositiveFloat = 30.0
    first_interval_s: PositiveFloat = 1.0
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
    """

    window_s: Annotated[float, Ge(1e-3)] | None = None
    window_examples: PositiveInt | None = None

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
        snapshot_interval_s: Seconds between cuts for serving, > 0, on the monotonic clock.
        lease_s: The lease that lets one trainer publish in a namespace ends so many seconds after it was last renewed,
            0.5 … 3600. A trainer that takes the place of a killed one waits so long at most.
        max_failed_steps: So many steps in a row whose loss or gradients are not finite stop the trainer, ≥ 1. Such a
            step changes nothing; its examples are dead-lettered.
        steps_before_replacing: Steps of weights that were started anew before they replace a model in service, ≥ 1.
        checkpoint: Checkpoints on disk.
        evaluation: Windows of frozen weights.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    threads: PositiveInt | None = 1
    snapshot_interval_s: PositiveFloat = 1.0
    lease_s: Annotated[float, Ge(0.5), Le(3600)] = 5.0
    max_failed_steps: PositiveInt = 5
    steps_before_replacing: PositiveInt = 1
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

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
