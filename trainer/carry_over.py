"""A checkpoint across a change of the schema: the training goes on, as the same lineage, with what it has learned.

What goes on: the weights with their optimisers and rows (:mod:`smes.model.carry_over`), everything that the stream has
read, joined and counted (:mod:`stream.carry_over`), and the figures of the tasks that there still are. What begins anew
is told by name. The change counts as a step of its own, so that no version names two sets of weights.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from smes.arrays import Arrays, prefixed, under
from smes.errors import CheckpointError
from smes.metrics import BinaryTally, RegressionTally
from smes.model.carry_over import carry_over as carry_over_learner
from smes.model.carry_over import carry_over_problems
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.rows_config import RowsConfig
from smes.schema import Schema, Task
from smes.schema_change import NEW, SchemaChange
from stream.carry_over import carry_over_stream, waiting_in
from stream.config import JoinConfig
from trainer.checkpoint_file import Checkpoint
from trainer.evaluation import with_all_scored
from trainer.gate_verdicts import Marks
from trainer.routing_history import RoutingHistory
from trainer.schemas_before import SchemasBefore

SCHEMAS = "trainer.schemas"
"""Name of the array of a :class:`trainer.schemas_before.SchemasBefore`."""


@dataclass(frozen=True, slots=True)
class CarryOver:
    """How checkpoints of a schema before are carried over to the present one.

    Attributes:
        change: From the checkpoint's schema to the present one.
        model, optimizer, rows, seed: Of the present learner.
        join: How the present stream joins.
        gate: Whether there is a publish gate.
    """

    change: SchemaChange
    model: ModelConfig
    optimizer: OptimizerConfig
    rows: RowsConfig
    seed: int
    join: JoinConfig
    gate: bool

    def problems(self, checkpoint: Checkpoint) -> list[str]:
        """What cannot be carried over, in words; empty if the checkpoint can be."""
        was_model = ModelConfig.from_dict(checkpoint.model)
        found = carry_over_problems(self.change, self.model, was_model)
        gate = under("gate.", checkpoint.arrays)
        if self.gate and gate and (refused := Marks(*gate["marks"].tolist()).in_a_row):
            found.append(
                f"the publish gate has refused the last {refused} cuts of the checkpoint, and would not know why under "
                "another schema: expected a checkpoint whose weights it lets pass, or trainer.gate.enabled: false"
            )
        return found

    def begins_anew(self, checkpoint: Checkpoint) -> list[str]:
        """What is not kept though it could be wished for, in words."""
        change, arrays = self.change, checkpoint.arrays
        stream = under("stream.", arrays)
        carried = carry_over_stream(stream, change, self.join)
        found = ["metrics: the open evaluation window ends; the routing's history begins anew"]
        if self.gate and under("gate.", arrays):
            found.append("publish gate: what it takes for usual, and the version that it compares with, begin anew")
        if carried.dropped:
            found.append(
                f"join: {carried.dropped:,} feedback events that wait are of dropped tasks; they are counted as dropped"
            )
        if np.any(change.tasks == NEW) and (waiting := waiting_in(stream)):
            found.append(f"join: {waiting:,} impressions that wait have no labels of the new tasks")
        if carried.restaged:
            found.append(
                "join: tasks wait otherwise than before: impressions that were trained on for some of their tasks are "
                "so with later feedback alone"
            )
        return found

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint under the present schema, one step later. The given one is not changed.

        Raises:
            CheckpointError: It has :meth:`problems`, or is not what the schema before makes.
        """
        change, arrays = self.change, checkpoint.arrays
        if problems := self.problems(checkpoint):
            raise CheckpointError(
                f"checkpoint of step {checkpoint.step}: cannot be carried over: {'; '.join(problems)}"
            )
        try:
            learner = carry_over_learner(
                {name: torch.from_numpy(array) for name, array in under("learner.", arrays).items()},
                change,
                self.model,
                self.optimizer,
                self.seed,
                rows=self.rows,
                was_model=ModelConfig.from_dict(checkpoint.model),
            )
            learner["step_number"] = learner["step_number"] + 1
            stream = carry_over_stream(under("stream.", arrays), change, self.join)
            carried = {
                **prefixed("learner.", {name: tensor.numpy() for name, tensor in learner.items()}),
                **prefixed("stream.", stream.state),
                **prefixed("evaluation.", carry_over_evaluation(under("evaluation.", arrays), change)),
                **prefixed("experts.", _experts(under("experts.", arrays))),
                **prefixed("arms.", carry_over_arms(under("arms.", arrays), change)),
                **{name: array for name, array in arrays.items() if name.startswith("trainer.")},
            }
            carried[SCHEMAS] = SchemasBefore.of(arrays[SCHEMAS]).then(change.was).array()
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"checkpoint of step {checkpoint.step}: {error}") from error
        return replace(
            checkpoint,
            step=checkpoint.step + 1,
            schema=change.now.to_dict(),
            schema_hash=change.now.hash,
            model=self.model.to_dict(),
            arrays=carried,
        )


def carry_over_evaluation(state: Arrays, change: SchemaChange) -> Arrays:
    """The state of an evaluation: figures go on by task; the frozen weights of the open window are given up."""
    state = with_all_scored(state)
    fixed = ("frozen.", *(f"{t}." for t in range(change.was.num_tasks)))
    converted = {name: array for name, array in state.items() if not name.startswith(fixed)}
    converted["group_auc"] = change.by_task(state["group_auc"], 0.0, axis=0)
    for name, array in converted.items():
        what = name.rpartition(".")[2]
        if name.startswith(("window.", "open.")) and what in _OF_WINDOWS:
            converted[name] = change.by_task(array, _OF_WINDOWS[what], axis=1)
    for now, was in enumerate(change.tasks.tolist()):
        figures = _new_tally(change.now.tasks[now]) if was == NEW else under(f"{was}.", state)
        converted |= prefixed(f"{now}.", figures)
    return converted


def carry_over_arms(state: Arrays, change: SchemaChange) -> Arrays:
    """The sums of the scorer's arms, by task."""
    was = _binary_places(change.was)
    pairs = zip(change.tasks.tolist(), change.now.tasks, strict=True)
    places = [was[old] if old != NEW else NEW for old, task in pairs if task.kind == "binary"]
    converted = dict(state)
    for name, array in state.items():
        what = name.rpartition(".")[2]
        if what == "sums":
            converted[name] = change.by_task(array, 0.0, axis=0)
        elif what == "counts":
            counts = np.zeros((len(places), *array.shape[1:]), array.dtype)
            for place, before in enumerate(places):
                if before != NEW:
                    counts[place] = array[before]
            converted[name] = counts
    return converted


_OF_WINDOWS: dict[str, object] = {"scores": np.nan, "labels": 0.0, "mask": False, "frozen": np.nan}
"""Columns of the evaluation's windows by task, and what they have of a task that is new."""


def _new_tally(task: Task) -> Arrays:
    return (BinaryTally() if task.kind == "binary" else RegressionTally()).state()


def _experts(state: Arrays) -> Arrays:
    """The routing figures: what was executed goes on; loads by task and the history begin anew."""
    return {
        "counts": state["counts"],
        "load": np.zeros((0, 0), np.int64),
        **prefixed("history.", RoutingHistory().state()),
    }


def _binary_places(schema: Schema) -> list[int]:
    """Each task's place among the binary ones; of a regression task it means nothing."""
    is_binary = np.array([task.kind == "binary" for task in schema.tasks])
    places: list[int] = (np.cumsum(is_binary) - 1).tolist()
    return places
