"""What goes into a checkpoint of a trainer, and comes out of it again.

All of it is of one moment between two steps: weights, optimiser state, id table, join state, positions, metrics, gate.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from smes.arrays import prefixed, under
from smes.errors import CheckpointError
from smes.model.deltas import StateArray, whole
from smes.model.learner import Learner
from smes.schema import MISSING
from trainer.arms_report import ArmTallies
from trainer.checkpoint_file import Checkpoint, CheckpointView
from trainer.checkpoint_parts import SHARDED
from trainer.evaluation import ProgressiveEvaluation
from trainer.gate import PublishGate
from trainer.routing_figures import ExpertTally
from trainer.schemas_before import SchemasBefore
from trainer.stream import Stream
from trainer.stretches import Stretches


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the training is.

    Attributes:
        trained, not_finite: As of :class:`trainer.loop.Trainer`.
        event_time_ms: Event time of the newest example trained on; None before the first.
        schemas: From which the lineage was carried over.
        steps: Joint steps of several ranks (:class:`trainer.rank_loop.RankTrainer`); None of one rank.
    """

    trained: int
    not_finite: int
    event_time_ms: int | None
    schemas: SchemasBefore
    steps: int | None = None


@dataclass(frozen=True, slots=True)
class TrainingState:
    """The parts of a trainer that a checkpoint keeps. Use it on the training thread.

    Attributes:
        learner, stream, evaluation, experts, arms: Of the trainer.
        gate: Its gate; None: the cuts are not judged.
        stretches: Its metrics over time; None: nobody asked for them.
        rank: Which one of the ranks that train together this is. Only rank 0 keeps what all have alike, and what it
            alone observes.
    """

    learner: Learner
    stream: Stream
    evaluation: ProgressiveEvaluation
    experts: ExpertTally
    arms: ArmTallies
    gate: PublishGate | None
    stretches: Stretches | None = None
    rank: int = 0

    def load(self, checkpoint: Checkpoint) -> Progress:
        """Put every part into the state of a checkpoint.

        Raises:
            CheckpointError: It lacks something, or does not fit.
        """
        arrays = checkpoint.arrays
        try:
            learner = under("learner.", arrays)
            self.learner.load_state({name: torch.from_numpy(array) for name, array in learner.items()})
            self.stream.load_state(under("stream.", arrays))
            self.evaluation.load_state(under("evaluation.", arrays))
            self.experts.load_state(under("experts.", arrays))
            self.arms.load_state(under("arms.", arrays))
            trained, not_finite = (int(n) for n in arrays["trainer.trained"])
            (event_time_ms,) = arrays["trainer.event_time_ms"].tolist()
            schemas = SchemasBefore.of(arrays["trainer.schemas"])
            gate = under("gate.", arrays)
            if self.gate is not None and gate:
                self.gate.load_state(gate)
            stretches = under("stretches.", arrays)
            if self.stretches is not None and stretches:
                self.stretches.load_state(stretches)
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"checkpoint of step {checkpoint.step}: {error}") from error
        return Progress(trained, not_finite, None if event_time_ms == MISSING else event_time_ms, schemas)

    def view(self, lineage: str, progress: Progress) -> tuple[CheckpointView, Callable[[], None]]:
        """The present state, to be written while training goes on, and what to call when it is on disk."""
        schema, model = self.learner.schema, self.learner.config.to_dict()
        learner, stream = self.learner.state_view(), self.stream.state()
        arrays = {**prefixed("learner.", learner.arrays), **prefixed("stream.", _kept(stream))}
        if self.rank:
            arrays = {name: array for name, array in arrays.items() if name.startswith(SHARDED)}
        else:
            arrays |= self._of_rank_0(progress)
        view = CheckpointView(
            lineage=lineage,
            step=self.learner.step_number,
            schema=schema.to_dict(),
            schema_hash=schema.hash,
            model=model,
            arrays=arrays,
            close=learner.close,
        )
        return view, lambda: self.stream.saved(stream)

    def _of_rank_0(self, progress: Progress) -> dict[str, StateArray]:
        """What rank 0 alone observes, and how far all ranks together are."""
        newest_ms = progress.event_time_ms
        arrays = {
            **prefixed("evaluation.", _kept(self.evaluation.state(), final="frozen.")),
            **prefixed("experts.", _kept(self.experts.state())),
            **prefixed("arms.", _kept(self.arms.state())),
            "trainer.trained": whole(np.array([progress.trained, progress.not_finite])),
            "trainer.event_time_ms": whole(np.array([MISSING if newest_ms is None else newest_ms], np.int64)),
            "trainer.schemas": whole(progress.schemas.array()),
        }
        if progress.steps is not None:
            arrays["trainer.steps"] = whole(np.array([progress.steps], np.int64))
        if self.gate is not None:
            arrays |= prefixed("gate.", _kept(self.gate.state(), final="reference."))
        if self.stretches is not None:
            arrays |= prefixed("stretches.", _kept(self.stretches.state(), final="base."))
        return arrays


def _kept(state: Mapping[str, NDArray[Any]], final: str = "\0") -> dict[str, StateArray]:
    """Copies of arrays that may change when training goes on; those whose name begins with ``final`` do not."""
    return {name: whole(array if name.startswith(final) else array.copy()) for name, array in state.items()}
