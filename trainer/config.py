"""What the training process can be told."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from trainer.checkpoint import CheckpointConfig
from trainer.evaluation import EvaluationConfig


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

    def open_device(self) -> torch.device:
        """The torch device that ``device`` names; sets torch's number of threads.

        Raises:
            ValueError: ``cuda`` without a usable CUDA device.
        """
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        usable = torch.cuda.is_available()
        if self.device == "cuda" and not usable:
            raise ValueError("trainer.device: 'cuda', expected auto or cpu: torch finds no usable CUDA device")
        return torch.device("cuda" if usable and self.device != "cpu" else "cpu")
