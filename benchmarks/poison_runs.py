"""One run over a poisoned stream: how well the version in service ranks clean examples that it has not seen.

The trainer's own loop trains, judges and cuts; instead of a store, :class:`InService` takes what it publishes. Along
the way, at fixed numbers of impressions of the log, the version in service scores the next impressions as they are in
the log. They count by their true probabilities, as if each had been labelled without end, so no luck of labels is in
the figures: of a pair (i, j), the share ``p_i (1 - p_j)`` has i positive and j negative.

Letters: N examples, T binary tasks, P points.
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.poison_streams import FarValues, FlippedLabels, LeftOut, OneUsersClicks, Part, Poison, PoisonedStream
from simulators.logs.reader import open_log
from simulators.merge import replay_blocks
from simulators.synthetic import truth_path
from simulators.world import TASK_NAMES
from smes.arrays import F32, F64
from smes.events import ExampleBlock
from smes.model.serving import ServingModel
from smes.schema import Schema
from smes_cli.building import build_evaluation, build_gate, build_learner
from smes_cli.config import Config
from stream.config import MiniBatchConfig
from trainer.cuts import Cut
from trainer.loop import SNAPSHOT, Trainer
from trainer.schedule import Flags

Gate = Literal["none", "hold", "go_back"]
GATES: tuple[Gate, ...] = ("none", "hold", "go_back")
LEFT_OUT = "a stretch left out"
POISONS = ("nothing", "flips in a row", "flips throughout", "values of 1e30", "one user's clicks")


@dataclass(frozen=True)
class Setting:
    """Where the poison is, and what is looked at.

    Attributes:
        log: A synthetic log; its truth lies beside it.
        impressions: Of the log, from its beginning.
        begin: Share of the impressions before the poison begins, 0 … 1.
        share: Of the stream that is poisoned.
        bursts: In how many stretches of equal length and distance, for a poison in a row.
        cut_every: Impressions between two cuts, rounded up to whole batches.
        look_every: Impressions between two looks; a quarter of it for a while after a stretch begins.
        looked_at: Clean impressions that a look scores.
        fewest_positives: A task counts at a point where it has so many expected positives.
        seed: Of the first weights.
        sift: ``trainer.gate.sift``.
    """

    log: Path
    impressions: int
    begin: float = 0.4
    share: float = 0.05
    bursts: int = 1
    cut_every: int = 256
    look_every: int = 2048
    looked_at: int = 6144
    fewest_positives: float = 25.0
    seed: int = 0
    sift: bool = True

    @property
    def first_poisoned(self) -> int:
        """Number of the impression at which the poison begins."""
        return round(self.begin * self.impressions)

    @property
    def last_of_stretch(self) -> int:
        """Number of the first impression after the first stretch of a poison in a row."""
        return self.first_poisoned + round(self.share * self.impressions / self.bursts)

    @property
    def period(self) -> int:
        """Impressions from the beginning of a stretch to that of the next."""
        return (self.impressions - self.first_poisoned) // self.bursts

    def next_look(self, look: int) -> int:
        """The look after the one at so many impressions."""
        since = look - self.first_poisoned
        is_close = since >= 0 and since % self.period < 3 * self.look_every
        return look + (self.look_every // 4 if is_close else self.look_every)

    @property
    def schema(self) -> Schema:
        """Of the log."""
        return self.config("none").schema_file().schema

    def config(self, gate: Gate) -> Config:
        """The default configuration, with or without the gate."""
        config = Config(schema="synthetic")
        return replace(
            config,
            stream=replace(config.stream, batch=MiniBatchConfig(size=256, max_wait_s=None)),
            trainer=replace(
                config.trainer,
                seed=self.seed,
                device="cpu",
                gate=replace(
                    config.trainer.gate,
                    enabled=gate != "none",
                    then="hold" if gate == "none" else gate,
                    sift=self.sift,
                ),
            ),
        )

    def blocks(self) -> Iterator[Any]:
        """The log's impressions and feedback, as a producer sends them."""
        with open_log(self.log, self.config("none").schema_file(), limit=self.impressions) as reader:
            yield from replay_blocks(reader, 0)

    def poison(self, name: str, clean: "CleanLog") -> Poison | None:
        """One of :data:`POISONS`, or :data:`LEFT_OUT`; None for ``nothing``.

        Raises:
            ValueError: It is none of them.
        """
        stretch = Part(self.first_poisoned, self.last_of_stretch, period=self.period)
        throughout = Part(self.first_poisoned, self.impressions, self.share)
        if name == LEFT_OUT:
            return LeftOut(stretch)
        if name == "flips in a row":
            return FlippedLabels(stretch)
        if name == "flips throughout":
            return FlippedLabels(throughout)
        if name == "values of 1e30":
            return FarValues(throughout)
        if name == "one user's clicks":
            return OneUsersClicks(stretch, clean.examples.take(slice(0, 1)), self.schema.task_index["click"])
        if name != "nothing":
            raise ValueError(f"poison {name!r}, expected one of {', '.join(POISONS)}")
        return None


class CleanLog:
    """The log's impressions as they are, in the order of the stream, with their true probabilities.

    Attributes:
        examples: All of them.
        truth_NT: float32 [N, T], in the order of :data:`simulators.world.TASK_NAMES`.
        tasks: Number of each binary task in the schema.
    """

    def __init__(self, setting: Setting) -> None:
        schema, batch = setting.schema, setting.config("none").stream.batch
        stream = PoisonedStream(schema, setting.config("none").stream.join, batch, setting.blocks(), None)
        taken = []
        while not stream.ended:
            stream.poll(0)
            while (examples := stream.next_batch()) is not None:
                taken.append(examples)
        self.examples = ExampleBlock.concat(taken)
        truth = pq.read_table(truth_path(setting.log)).slice(0, setting.impressions)
        by_id_NT = np.stack([truth.column(name).to_numpy() for name in TASK_NAMES], axis=1)
        self.truth_NT: F32 = by_id_NT[self.examples.impression_id]
        self.tasks = [schema.task_index[name] for name in TASK_NAMES]


class InService:
    """Takes the trainer's cuts in the place of a publisher with its store: what is not held back is in service.

    Attributes:
        step: Of the version in service; -1 before the first.
        published: Cuts that were served.
    """

    wants_full, wants_base, has_owed, promoted = True, False, False, False

    def __init__(self, schema: Schema, config: Config) -> None:
        self._schema, self._config = schema, config
        self._state: dict[str, torch.Tensor] = {}
        self.step = -1
        self.published = 0

    def offer(self, cut: Cut) -> None:
        """Take a full cut."""
        view = cut.view
        assert view is not None, "full cuts are asked for"
        if cut.held:
            view.close()
            return
        keys, columns = zip(*view.blocks(), strict=True)
        table = {name: np.concatenate([block[name] for block in columns]) for name in view.columns}
        state = dict(cut.dense) | {f"table.{name}": torch.from_numpy(array) for name, array in table.items()}
        state["table.keys"] = torch.from_numpy(np.concatenate(keys))
        self._state, self.step = state, cut.step
        self.published += 1
        view.close()

    def model(self) -> ServingModel:
        """The version in service; there is one."""
        return ServingModel.from_state(self._schema, self._config.model, self._state)

    def check(self) -> None:
        """Nobody else publishes."""

    def look_for_promoted(self) -> None:
        """Nobody promotes anything."""

    def close(self, **_: Any) -> bool:
        """Nothing waits."""
        return True


@dataclass(frozen=True)
class Served:
    """What one run found.

    Attributes:
        at: Impressions of the log trained on or seen, int [P].
        auc: float64 [P, T], of the version in service; NaN where a task has too few positives.
        old_auc: The same of the version that was in service when the poison began; NaN but for the first stretch.
        behind: Steps between the version in service and the weights trained, int [P].
        facts: Counts for a table.
    """

    at: list[int]
    auc: F64
    old_auc: F64
    behind: list[int]
    facts: dict[str, Any]


def run(setting: Setting, clean: CleanLog, poison: str, gate: Gate) -> Served:
    """Train over the stream with one poison, behind one gate."""
    config = setting.config(gate)
    schema = setting.schema
    started_s = time.monotonic()
    stream = PoisonedStream(
        schema, config.stream.join, config.stream.batch, setting.blocks(), setting.poison(poison, clean)
    )
    learner, flags = build_learner(config, schema), Flags()
    gated = build_gate(config, learner)
    trainer = Trainer(learner, stream, build_evaluation(config, learner), flags, gated=gated)
    service = InService(schema, config)
    trainer.publish_to(lambda lineage: service, None)  # type: ignore[arg-type, return-value]  # takes its place
    at: list[int] = []
    aucs: list[F64] = []
    old_aucs: list[F64] = []
    behind: list[int] = []
    old: ServingModel | None = None
    back_at, backs = -1, 0
    next_cut = next_look = 0
    reasons: Counter[str] = Counter()
    while True:
        if not trainer.step():
            if stream.ended:
                break
            stream.poll(0)
            continue
        if stream.taken >= next_cut:
            next_cut += setting.cut_every
            flags.request(SNAPSHOT)
        trainer.run_requested()
        if gated is not None and gated.gate.refuses:
            reasons[gated.gate.reason.split(":")[0]] += 1
        if gated is not None and gated.gate.backs and gated.gate.backs[-1].at_step != back_at:
            back_at, backs = gated.gate.backs[-1].at_step, backs + 1
        if old is None and stream.taken >= setting.first_poisoned:
            old = service.model()
        if stream.taken >= next_look and stream.taken + setting.looked_at <= setting.impressions:
            next_look = setting.next_look(next_look)
            if service.step >= 0:
                at.append(stream.taken)
                aucs.append(_auc(service.model(), clean, stream.taken, setting))
                is_past = stream.taken > setting.last_of_stretch
                unknown = np.full_like(aucs[-1], np.nan)
                old_aucs.append(unknown if old is None or is_past else _auc(old, clean, stream.taken, setting))
                behind.append(learner.step_number - service.step)
    facts = {
        "published": service.published,
        "refused": gated.gate.summary()["refused"] if gated else 0,
        "reasons": dict(reasons),
        "went_back": backs,
        "steps": learner.step_number,
        "seconds": time.monotonic() - started_s,
    }
    return Served(at, np.array(aucs), np.array(old_aucs), behind, facts)


def _auc(model: ServingModel, clean: CleanLog, first: int, setting: Setting) -> F64:
    rows = slice(first, first + setting.looked_at)
    scores_NT = model.score(clean.examples.ids[rows], clean.examples.numerics[rows])[:, clean.tasks]
    return np.array(
        [
            expected_auc(scores, truth) if truth.sum() >= setting.fewest_positives else np.nan
            for scores, truth in zip(scores_NT.T, clean.truth_NT[rows].T, strict=True)
        ]
    )


def expected_auc(scores: F32, truth: F32) -> float:
    """AUC over all labels that the true probabilities may draw: pairs weigh ``p_i (1 - p_j)``. float32 [N] each."""
    order = np.argsort(scores, kind="stable")
    positive, negative = truth[order].astype(np.float64), 1.0 - truth[order].astype(np.float64)
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.nan) != 0)  # ties count as half
    positive, negative = np.add.reduceat(positive, starts), np.add.reduceat(negative, starts)
    below = np.cumsum(negative) - negative / 2
    return float((positive * below).sum() / (positive.sum() * negative.sum()))
