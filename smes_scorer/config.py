"""What the scoring service can be told."""

import math
from dataclasses import dataclass, field

import numpy as np

from smes.arrays import F32
from smes.schema import Schema


@dataclass(frozen=True)
class ScorerConfig:
    """How the scoring service listens, scores and guards itself.

    Attributes:
        host: Address to listen on.
        port: TCP port, 0 for any free one.
        fusion_weights: Task → factor of its score in the fused ranking. A task left out weighs 1 if it is binary and
            0 if it is a regression.
        max_items: Most items of one request, ≥ 1.
        max_body_bytes: Largest request body, ≥ 1.
        workers: Requests scored at the same time, ≥ 1.
        torch_threads: Threads of one scoring, ≥ 1; 1 leaves the other cores to other requests and to the trainer.
        entity_timeout_ms: Longest wait for the features of a request; then it is scored without them.
        entity_retry_s: After such a failure, how long requests go without asking.
        poll_s: A new snapshot is noticed at the latest after this, also when its notification was lost.
        redis_timeout_s: Longest wait for Redis at the start, and for each answer while a snapshot is loaded.
        shutdown_s: How long requests in flight may take to end when the service is told to stop.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    fusion_weights: dict[str, float] = field(default_factory=dict)
    max_items: int = 1000
    max_body_bytes: int = 1024 * 1024
    workers: int = 2
    torch_threads: int = 1
    entity_timeout_ms: int = 50
    entity_retry_s: float = 1.0
    poll_s: float = 0.5
    redis_timeout_s: float = 5.0
    shutdown_s: int = 10

    def __post_init__(self) -> None:
        for name in ("max_items", "max_body_bytes", "workers", "torch_threads", "entity_timeout_ms", "shutdown_s"):
            if getattr(self, name) < 1:
                raise ValueError(f"scorer.{name}: {getattr(self, name)}, expected at least 1")
        for name in ("entity_retry_s", "poll_s", "redis_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"scorer.{name}: {getattr(self, name)}, expected more than 0 seconds")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"scorer.port: {self.port}, expected 0 … 65535")
        for task, weight in self.fusion_weights.items():
            if not math.isfinite(weight):
                raise ValueError(f"scorer.fusion_weights.{task}: {weight}, expected a finite number")


def fusion_weights(config: ScorerConfig, schema: Schema) -> F32:
    """float32 [T]: the factor of each task's score in the fused ranking.

    Raises:
        ValueError: The configuration names a task that the schema does not have.
    """
    for task in config.fusion_weights:
        if task not in schema.task_index:
            raise ValueError(f"scorer.fusion_weights: unknown task {task!r}, expected one of {list(schema.task_index)}")
    weights = [config.fusion_weights.get(t.name, 1.0 if t.kind == "binary" else 0.0) for t in schema.tasks]
    return np.array(weights, np.float32)
