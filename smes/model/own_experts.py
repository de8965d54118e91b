"""Which tasks would gain from experts of their own: figures and a verdict, from what corrections have seen.

Everything is over the last half of the stream. Letters: T tasks, S blocks of steps.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from smes.arrays import F64
from smes.model.corrections import CorrectionSums

LEAST_PCT = 0.25
"""In percent of the task's loss. Own experts would help if the own network's lead over the shared one is told from
noise, at least this, and at least half of what the own network gains. If a lead of twice that size cannot be ruled out,
there are too few positives to tell. Else more shared experts would help if the shared network gains at least this."""
ERRORS = 2.0
"""A gain of more than so many standard errors is told from noise."""
LEAST_POSITIVES = 50
LEAST_BLOCKS = 8

Verdict = Literal[
    "own experts would help",
    "more shared experts would help",
    "shared is enough",
    "too few positives to tell",
    "has its own already",
]


@dataclass(frozen=True, slots=True)
class Gain:
    """A fall of the task's loss, in percent of it, with its standard error; above 0 is better."""

    pct: float
    error_pct: float

    @property
    def is_there(self) -> bool:
        """Whether it is told from noise."""
        return self.pct > ERRORS * self.error_pct

    @property
    def most_pct(self) -> float:
        """The largest gain that is not ruled out."""
        return self.pct + ERRORS * self.error_pct


@dataclass(frozen=True, slots=True)
class OwnExperts:
    """What experts of its own would be worth to one task.

    Attributes:
        task: Its name.
        group: Names of the tasks that it shares experts with, its own included.
        positives: Labels above 0 in the last half of the stream.
        own: What a network of its own gains over the model's recalibrated logit; None if the stream was too short, or
            the network's loss is not finite.
        shared: What a network of that width gains that the task's whole group reads.
        lead: The first minus the second.
        cosine: Of the task's gradient with the sum of its group's, on the representation: how much of what moves the
            shared experts serves this task, -1 … 1. None for a ranker without representations.
        verdict: In words.
    """

    task: str
    group: tuple[str, ...]
    positives: int
    own: Gain | None
    shared: Gain | None
    lead: Gain | None
    cosine: float | None
    verdict: Verdict


def own_experts(sums: CorrectionSums, tasks: list[str]) -> list[OwnExperts]:
    """The figures of each task.

    Args:
        sums: What the corrections have seen.
        tasks: Names of the T tasks.
    """
    last = len(sums.loss_SKT) // 2
    positives_ST, loss_SKT, gram_TT = sums.positives_ST[last:], sums.loss_SKT[last:], sums.gram_STT[last:].sum(axis=0)
    figures = []
    for t, name in enumerate(tasks):
        members = [m for m, group in enumerate(sums.group_T) if group == sums.group_T[t]]
        plain_S, own_S, shared_S = loss_SKT[:, :, t].T
        own, shared = _gain(plain_S - own_S, plain_S), _gain(plain_S - shared_S, plain_S)
        lead = _gain(shared_S - own_S, plain_S)
        positives = int(positives_ST[:, t].sum())
        verdict: Verdict = "has its own already" if len(members) == 1 else _verdict(positives, own, shared, lead)
        group = tuple(tasks[m] for m in members)
        figures.append(OwnExperts(name, group, positives, own, shared, lead, _cosine(gram_TT, t, members), verdict))
    return figures


def own_experts_report(sums: CorrectionSums, tasks: list[str]) -> list[dict[str, Any]]:
    """:func:`own_experts` as plain JSON values, in the order of the tasks."""
    return [asdict(figure) | {"group": list(figure.group)} for figure in own_experts(sums, tasks)]


def _gain(fall_S: F64, loss_S: F64) -> Gain | None:
    """The ratio of two sums over blocks, and its error from how the blocks scatter around it."""
    blocks, total = len(loss_S), float(loss_S.sum())
    if blocks < LEAST_BLOCKS or not total > 0 or not np.isfinite(fall_S).all():
        return None
    share = float(fall_S.sum()) / total
    scatter = float(np.square(fall_S - share * loss_S).sum())
    return Gain(100 * share, 100 * float(np.sqrt(blocks / (blocks - 1) * scatter)) / total)


def _cosine(gram_TT: F64, task: int, members: list[int]) -> float | None:
    group = gram_TT[np.ix_(members, members)].sum()
    length = float(np.sqrt(max(gram_TT[task, task] * group, 0.0)))
    return float(gram_TT[task, members].sum()) / length if length > 0 else None


def _verdict(positives: int, own: Gain | None, shared: Gain | None, lead: Gain | None) -> Verdict:
    if own is None or shared is None or lead is None or positives < LEAST_POSITIVES:
        return "too few positives to tell"
    least_pct = max(LEAST_PCT, own.pct / 2)
    if own.is_there and lead.is_there and lead.pct >= least_pct:
        return "own experts would help"
    if lead.most_pct >= 2 * least_pct and own.most_pct >= 2 * LEAST_PCT:
        return "too few positives to tell"
    more_helps = shared.is_there and shared.pct >= LEAST_PCT
    return "more shared experts would help" if more_helps else "shared is enough"
