"""Do the experts of the other tasks serve a new one? While it is on probe, the stream tells.

Two figures decide, both over the last half of the probe so far (:mod:`smes.model.corrections`):

- whether a network of the task's own still gains over the model's recalibrated logit: then something is left to learn;
- the cosine of the task's gradient on what the experts give with the sum of the other tasks' gradients. Where it is
  near 0, what moves the experts for the others is of no use to the task, which for them is one of many.

So a task gets experts of its own if something is left to gain and the others do not serve it. If they do, or if nothing
is left to gain when the probe ends, it reads theirs for good. After LLaVA-CMoE (arXiv 2503.21227), which looks at how
often trial experts are chosen instead.

Letters: B instances, T tasks, S blocks of steps.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from smes.arrays import prefixed, under
from smes.joint_batch import JointBatch
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.corrections import Corrections, CorrectionSums
from smes.model.devices import RankBatch
from smes.model.own_experts import Gain, own_experts
from smes.model.rank_model import ModelOutput
from smes.rankers.ranker import Clusters
from smes.schema import Schema

_logger = logging.getLogger(__name__)

SERVED_FROM = 0.02
"""From this cosine on the other tasks' gradients serve a task (docs/experiments/schema_change.md)."""
EVERY = 16_384
"""So many instances lie between two looks. The first finds too little: young gradients tell less."""

Verdict = Literal["own experts", "the others serve it", "nothing left to gain", "on probe"]


@dataclass(frozen=True, slots=True)
class ProbeFinding:
    """What is known of a task on probe.

    Attributes:
        task: Its index.
        own: What a network of its own gains; None if too little was seen.
        cosine: Of its gradient with the others', in the mean over blocks.
        cosine_error: Standard error of that.
        verdict: In words.
    """

    task: int
    own: Gain | None
    cosine: float
    cosine_error: float
    verdict: Verdict


class Probe:
    """A :class:`smes.model.step_watcher.StepWatcher` that decides which tasks on probe get experts of their own.

    Args:
        schema: The tasks.
        tasks: Which are on probe.
        model: Gives the length of the probe and the factors of the tasks' gradients.
        optimizer: Gives the learning rate.
        seed: Of the corrections' first weights, ≥ 0.

    Attributes:
        tasks: Which are on probe still.
        findings: The last finding of each task, by its index.
    """

    def __init__(
        self, schema: Schema, tasks: Sequence[int], model: ModelConfig, optimizer: OptimizerConfig, seed: int
    ) -> None:
        self.tasks = tuple(tasks)
        self.findings: dict[int, ProbeFinding] = {}
        self._names = [task.name for task in schema.tasks]
        self._until = model.smes.groups.probe_until
        self._seen = 0
        self._corrections = Corrections(schema, (0,) * schema.num_tasks, optimizer, model.rare, seed)

    def before_backward(self, output: ModelOutput) -> None:
        self._corrections.before_backward(output)

    def after_backward(self, output: ModelOutput, batch: RankBatch) -> None:
        self._corrections.after_backward(output, batch)

    def regroup(self, groups: Clusters) -> None:
        """All tasks are compared with all others, whatever their groups."""

    def observe(self, instances: int, batch: JointBatch | None = None) -> tuple[int, ...]:
        """Count instances of a step that was taken; return the tasks that get experts of their own now.

        Args:
            instances: Of several ranks, those of all of them.
            batch: The batch of all ranks; None: there is one rank.
        """
        before, self._seen = self._seen, self._seen + instances
        if (before // EVERY == self._seen // EVERY or self._seen < 2 * EVERY) and self._seen < self._until:
            return ()
        found = probe_findings(self._corrections.sums, self._names, self.tasks, last=self._seen >= self._until)
        self.findings |= {finding.task: finding for finding in found}
        self.tasks = tuple(finding.task for finding in found if finding.verdict == "on probe")
        own = tuple(finding.task for finding in found if finding.verdict == "own experts")
        if batch is not None:
            self.tasks, own = batch.decided([self.tasks, own])
        for finding in found:
            if finding.task not in self.tasks:
                figures = f"cosine with the others {finding.cosine:.4f} ± {finding.cosine_error:.4f}"
                _logger.info("probe of task %r: %s (%s)", self._names[finding.task], finding.verdict, figures)
        return own

    def state(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of everything that :meth:`load_state` needs."""
        own = {"tasks": torch.tensor(self.tasks, dtype=torch.int64), "seen": torch.tensor(self._seen)}
        return own | prefixed("corrections.", self._corrections.state())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a :meth:`state`; from ``tasks`` alone begin.

        Raises:
            KeyError, RuntimeError: A tensor is missing, unknown or of another shape.
        """
        self.tasks = tuple(state["tasks"].tolist())
        if "seen" in state:
            self._seen = int(state["seen"])
            self._corrections.load_state(under("corrections.", state))


def probe_findings(sums: CorrectionSums, names: list[str], tasks: Sequence[int], *, last: bool) -> list[ProbeFinding]:
    """What is known of some tasks.

    Args:
        sums: What the corrections have seen.
        names: Of all tasks.
        tasks: The tasks on probe.
        last: Whether the probe ends.
    """
    gains = [figure.own for figure in own_experts(sums, names)]
    gram_STT = sums.gram_STT[len(sums.gram_STT) // 2 :]
    found = []
    for t in tasks:
        cosine, error = _cosine_with_others(gram_STT, t)
        found.append(ProbeFinding(t, gains[t], cosine, error, _verdict(gains[t], cosine, error, last=last)))
    return found


def _cosine_with_others(gram_STT: np.ndarray, task: int) -> tuple[float, float]:
    others = [t for t in range(gram_STT.shape[1]) if t != task]
    dot_S = gram_STT[:, task, others].sum(axis=1)
    square_S = gram_STT[:, task, task] * gram_STT[:, others][:, :, others].sum(axis=(1, 2))
    cosine_S = dot_S / np.sqrt(np.maximum(square_S, 1e-300))
    if len(cosine_S) < 2:
        return float(cosine_S.sum()), float("inf")
    return float(cosine_S.mean()), float(cosine_S.std(ddof=1) / np.sqrt(len(cosine_S)))


def _verdict(own: Gain | None, cosine: float, error: float, *, last: bool) -> Verdict:
    if own is not None and own.is_there:
        if cosine + 2 * error < SERVED_FROM:
            return "own experts"
        if cosine - 2 * error > SERVED_FROM:
            return "the others serve it"
    return "nothing left to gain" if last else "on probe"
