"""What the training process can be told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CheckpointConfig:
    """Where and how often.

    Attributes:
        directory: Folder of the checkpoints; made when missing. None: the trainer keeps none and starts anew.
        interval_s: Seconds between checkpoints, > 0; one is always taken at a clean stop.
        keep: How many of the newest are kept, ≥ 1.
    """

    directory: Path | None = None
    interval_s: float = 30.0
    keep: int = 2

    def __post_init__(self) -> None:
        if not self.interval_s > 0:
            raise ValueError(f"interval_s {self.interval_s}, expected more than 0 seconds")
        if self.keep < 1:
            raise ValueError(f"keep {self.keep}, expected at least 1")


@dataclass(frozen=True)
class EvaluationConfig:
    """Windows of frozen weights.

    Attributes:
        window_s: Stretch of event time scored by one frozen copy, seconds, ≥ 0.001; counted from 1970-01-01 UTC. A
            whole part of the schema's history window, if there is one. None: that window, or a day.
        window_examples: Most examples in it, ≥ 1; bounds memory and checkpoints (about 100 bytes an example). Early
            windows are shorter: none is longer than all that was trained on before it began. None: 16,384, or
            262,144 where the schema has a history: its windows are the users', whatever the traffic.
    """

    window_s: float | None = None
    window_examples: int | None = None

    def __post_init__(self) -> None:
        if self.window_s is not None and not self.window_s >= 1e-3:
            raise ValueError(f"window_s {self.window_s}, expected at least a millisecond")
        if self.window_examples is not None and self.window_examples < 1:
            raise ValueError(f"window_examples {self.window_examples}, expected at least 1")


@dataclass(frozen=True)
class TrainerConfig:
    """The training process.

    Attributes:
        device: ``auto`` takes CUDA where it is usable, else the CPU.
        seed: Of the first weights, dense ones and embedding rows.
        threads: Of torch on the CPU; None leaves torch's choice. Bit-for-bit restarts need the same number.
        snapshot_interval_s: Seconds between cuts for serving, > 0.
        checkpoint: Where and how often to disk.
        evaluation: Windows of frozen weights.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    threads: int | None = None
    snapshot_interval_s: float = 1.0
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads {self.threads}, expected at least 1")
        if not self.snapshot_interval_s > 0:
            raise ValueError(f"snapshot_interval_s {self.snapshot_interval_s}, expected more than 0 seconds")

    def open_device(self) -> "torch.device":
        """The torch device that ``device`` names; sets torch's number of threads.

        Raises:
            ValueError: ``cuda`` without a usable CUDA device.
        """
        import torch  # here, as most commands that read a configuration do without it

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        usable = torch.cuda.is_available()
        if self.device == "cuda" and not usable:
            raise ValueError("trainer.device: 'cuda', expected auto or cpu: torch finds no usable CUDA device")
        return torch.device("cuda" if usable and self.device != "cpu" else "cpu")
