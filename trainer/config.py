"""Configuration of the training process."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge

from smes.ranges import PositiveFloat, PositiveInt, check_ranges

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CheckpointConfig:
    """Where checkpoints are kept, and how often one is written.

    Attributes:
        directory: Folder of the checkpoints, created if missing. None: the trainer keeps none and starts anew.
        interval_s: Seconds between checkpoints, > 0; a clean stop always writes one.
        keep: How many of the newest are kept, ≥ 1.
    """

    directory: Path | None = None
    interval_s: PositiveFloat = 30.0
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
        threads: Threads of torch on the CPU, ≥ 1; None leaves torch's choice. A restart is the same bit for bit only
            with the same number.
        snapshot_interval_s: Seconds between cuts for serving, > 0.
        checkpoint: Checkpoints on disk.
        evaluation: Windows of frozen weights.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    threads: PositiveInt | None = None
    snapshot_interval_s: PositiveFloat = 1.0
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
