"""The publish gate: whether a cut may be published, by examples that neither it nor the version in service has seen.

A sample of the stream is scored by the version in service, as it was at the last cut that passed. That version does
not change, so it does not matter when it scores. The weights that are trained score every batch just before the step on
it anyway. A cut is refused if

1. a weight or a score is not finite;
2. it is out of calibration: the labels of the newest stretch are not what it expected, or its scores are far from the
   base rate of all that went before;
3. it is worse than the version in service on the same examples, in loss or AUC, by a paired test;
4. the stream that it learned from is suspect (:mod:`trainer.gate_stream`): the version in service suddenly fits much
   worse than it did, or one user gives an implausible share of the examples, or values are far out of their range.
   What was learned from flipped labels fits flipped labels well, so no other test would tell.

Every difference has to exceed its margin and ``z`` standard errors. With T tasks a judgement makes tests with at most
26 · T sides. If standard errors are right, noise alone refuses a good cut with probability below 26 · T · 2.9e-7 at
z = 5, so less than once in 3,000 cuts for 40 tasks, and the margins make it rarer still. A good cut that is refused
costs the freshness until the next one passes, which contains it all.

Once the stream was suspect, or a cut was refused, the burden of proof changes: a stretch as long as twice the one that
gave the stream away has to be in order, and differences of 2.5 standard errors count.

Impressions that are trained on before their labels are final count when these have come: until then the gate sees
nothing of them.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from smes.arrays import F32, F64, I64, Arrays, Bool, prefixed, under
from smes.events import WHOLE, ExampleBlock
from smes.hashing import splitmix64
from smes.schema import Schema
from trainer.config import GateConfig
from trainer.gate_candidate import find_faults
from trainer.gate_findings import (
    BASE_RATE,
    LEARNED,
    NOT_FINITE,
    STREAM_LABELS,
    STREAM_USER,
    TOO_FEW,
    Finding,
    reason_of,
)
from trainer.gate_sample import Examples, SampledStretch
from trainer.gate_sifting import Sifter
from trainer.gate_stream import FEWEST, StreamHistory
from trainer.gate_verdicts import Marks, Reference, Verdict, WentBack
from trainer.observers import Observer, StepFigures
from trainer.ranked_windows import OpenImpressions

_logger = logging.getLogger(__name__)

_BACKS_KEPT = 16
_FEWEST_AFTER_REFUSAL = 256  # sampled examples
_Z_AFTER_REFUSAL = 2.5
_ALL = 2.0**64
_SCORED_AT_ONCE = 512  # examples: a call costs as much as some 300 of them


class PublishGate(Observer):
    """Judges cuts. Its memory is bounded by ``stretch_examples``, and by the open attribution windows' sample.

    Args:
        schema: Features and tasks.
        config: Margins.
        thaw: Makes the reference again that a state was taken from, in the learner's state of the same moment.

    Attributes:
        config: As given.
        reference: What cuts are compared with; None before the first.
        backs: The newest times that the weights went back, oldest first.
        reason: Why the last cut was refused; empty if it passed.
    """

    def __init__(self, schema: Schema, config: GateConfig, *, thaw: Callable[[Arrays], Reference]) -> None:
        self.config, self._schema, self._thaw = config, schema, thaw
        self._history = StreamHistory(schema, config)
        self._sample = SampledStretch(config.stretch_examples, self._history.binary)
        self._sifter = Sifter(self._history.binary, config.stretch_examples)
        self._open = OpenImpressions(schema.num_tasks)
        self._unscored: list[tuple[ExampleBlock, F32]] = []
        self._suspicion: list[Finding] = []
        self._sifting_began = False  # at this judgement
        self._in_a_row_before = 0  # this judgement
        self._marks = Marks()
        self._new_range: F64 = _no_range(schema.num_numerics)
        self.reference: Reference | None = None
        self.backs: list[WentBack] = []
        self.reason = ""

    # What the observer sees.

    @property
    def sifts(self) -> bool:
        """Whether implausible examples are left out (:mod:`trainer.gate_sifting`)."""
        return self._sifter.is_on

    def sift(self, examples: ExampleBlock) -> ExampleBlock:
        """A batch before its step: what is to teach nothing has weight 0. The same object if nothing is left out."""
        if not self._sifter.is_on or self.reference is None:
            return examples
        served = self.reference.score(examples.ids, examples.numerics, examples.event_time_ms)
        return self._sifter.sift(examples, served)

    def after_step(self, examples: ExampleBlock, figures: StepFigures) -> None:
        """Take the scores that the weights gave the batch just before they were trained on it."""
        marks = self._marks
        marks.event_time_ms = max(marks.event_time_ms, int(examples.event_time_ms.max()))
        marks.not_finite += int((~np.isfinite(figures.scores)).any(axis=1).sum())
        rows = np.flatnonzero(examples.begins & self._sampled(examples.impression_id))
        if self.reference is None or not len(rows):
            return
        self._unscored.append((examples.take(rows), figures.scores[rows]))
        if sum(len(sampled) for sampled, _ in self._unscored) >= _SCORED_AT_ONCE:
            self.score_rest()

    def score_rest(self) -> None:
        """Let the version in service score what it has not yet."""
        if not self._unscored or self.reference is None:
            return
        blocks, scores = zip(*self._unscored, strict=True)
        sampled, live = ExampleBlock.concat(blocks), np.concatenate(scores)
        self._unscored = []
        served = self.reference.score(sampled.ids, sampled.numerics, sampled.event_time_ms)
        whole = sampled.kind == WHOLE
        if whole.all():
            self._add(sampled, served, live)
            return
        self._add(sampled.take(whole), served[whole], live[whole])
        begun = sampled.impression_id[~whole]
        self._open.begin(begun, 0)
        self._open.score_frozen(begun, served[~whole])
        self._open.score(begun, live[~whole])

    def after_closing(self, examples: ExampleBlock) -> None:
        """Take in the impressions whose final labels have come."""
        self.score_rest()
        known, noted = self._open.close(examples)
        if len(known):
            self._add(known, noted["frozen"], noted["scores"])

    def _sampled(self, impression_id: I64) -> Bool:
        """Which impressions are of the sample: by a hash, so that a restart takes the same."""
        if self.config.sample_share >= 1:
            return np.ones(len(impression_id), np.bool_)
        chosen: Bool = splitmix64(impression_id) < np.uint64(self.config.sample_share * _ALL)
        return chosen

    def _add(self, examples: ExampleBlock, served: F32, live: F32) -> None:
        believed = self._sifter.plausible(examples.user_id, served, examples.labels, examples.label_mask)
        if not believed.all():
            examples, served, live = examples.take(believed), served[believed], live[believed]
        odd = self._history.odd(examples.numerics)
        usual = examples.numerics[~odd].astype(np.float64)
        if usual.size:
            low, high = self._new_range
            self._new_range = np.stack(
                [np.fmin(low, np.fmin.reduce(usual, axis=0)), np.fmax(high, np.fmax.reduce(usual, axis=0))]
            )
        mask = examples.label_mask & np.isfinite(served) & np.isfinite(live)
        self._sample.add(Examples(examples.user_id.copy(), odd, examples.labels, mask, served, live))
        if self._sample.total - self._marks.looked_at >= self._sample.size // 2:
            self._look()

    # Judging.

    def judge(self, *, promoted: bool = False) -> Verdict:
        """Judge the present weights as a cut. Call it when every step's result was delivered.

        Args:
            promoted: Somebody has just put a cut into service that was refused: then only scores that are not finite
                speak against the weights.
        """
        self._sifting_began = False
        findings = self._findings()
        marks = self._marks
        if promoted:
            findings = [finding for finding in findings if finding.code == NOT_FINITE]
        marks.not_finite = 0
        if not findings:
            marks.passed += 1
            self._in_a_row_before, marks.in_a_row, self.reason = marks.in_a_row, 0, ""
            return Verdict(True)
        return self._refuse(findings)

    def refuse_weights(self, what: str) -> None:
        """Refuse the cut that has just passed: a weight of it, ``what``, is not finite."""
        self._marks.passed -= 1
        self._marks.in_a_row = self._in_a_row_before
        self._refuse([Finding(NOT_FINITE, what, "values that are not finite, expected finite ones")])

    def _refuse(self, findings: Sequence[Finding]) -> Verdict:
        marks, config = self._marks, self.config
        marks.refused += 1
        marks.in_a_row += 1
        marks.is_open = 0
        self.reason = reason_of(findings)
        is_alarm = marks.in_a_row == config.max_refusals
        marks.alarms += is_alarm
        level = logging.ERROR if is_alarm else logging.WARNING if marks.in_a_row == 1 else logging.INFO
        _logger.log(level, "cut refused, %d in a row; the version in service stays: %s", marks.in_a_row, self.reason)
        return Verdict(False, self.reason, go_back=self._goes_back())

    def _goes_back(self) -> bool:
        """Whether the weights of a refused cut are to go back, if that is configured and there is a cut to go to.

        They do so at once where waiting can change nothing: when sifting begins, and when the stream is as usual again
        but they learned from the suspect part of it. Else they do so with the alarm, unless they are as good as they
        were: then the stream is suspect, but nothing suspect was learned since they went back.
        """
        marks, config = self._marks, self.config
        if config.then != "go_back" or self.reference is None:
            return False
        if self._sifting_began or (marks.learned_suspect and not self._suspicion):
            return True
        is_as_it_was = self._sifter.is_on and bool(self._suspicion) and not marks.learned_suspect
        return marks.in_a_row >= config.max_refusals and not is_as_it_was

    def _findings(self) -> list[Finding]:
        marks, config = self._marks, self.config
        findings = []
        if marks.not_finite:
            text = f"scores of {marks.not_finite} examples are not finite, expected finite ones"
            findings.append(Finding(NOT_FINITE, "", text))
        if self.reference is None:
            return findings
        self.score_rest()
        self._look()
        self._decide_on_sifting()
        kept = self._sample.newest(self._sample.length(marks.compared_from))
        faults = find_faults(kept, self._history, config, z=config.z if marks.is_open else _Z_AFTER_REFUSAL)
        if not marks.is_open and len(kept) < _FEWEST_AFTER_REFUSAL:
            text = f"{len(kept)} examples since it was refused, expected {_FEWEST_AFTER_REFUSAL}"
            faults.append(Finding(TOO_FEW, "", text))
        if self._suspicion and self._is_steady([*findings, *faults]):
            self.accept_stream("it has stayed as it is now, and the candidate fits it")
            return []
        if marks.learned_suspect and not self._suspicion and config.then == "go_back":
            findings.append(Finding(LEARNED, "", "the weights learned from a stretch that was suspect"))
        return [*findings, *self._suspicion, *faults]

    def _decide_on_sifting(self) -> None:
        """Begin to sift with a suspicion, and end when little is implausible any more."""
        config, marks, sifter = self.config, self._marks, self._sifter
        if config.sift and self._suspicion:
            if not sifter.is_on:
                sifter.begin(marks.event_time_ms)
                self._sifting_began = sifter.is_on
            if any(finding.code == STREAM_USER for finding in self._suspicion):
                sifter.leave_out(self._history.flooding(self._sample))
            where = {finding.where for finding in self._suspicion if finding.code in STREAM_LABELS}
            if sifter.is_on and sifter.leave_out_tasks(np.array([name in where for name in self._history.names])):
                self._sifting_began = True
            if sifter.is_on and not self._sifting_began:
                marks.learned_suspect = 0  # from what was left out nothing was learned
        if not sifter.is_on:
            return
        if not self._suspicion:
            sifter.end_if_quiet()
        after_s = config.accept_after_s
        if after_s is not None and sifter.is_on and marks.event_time_ms - sifter.since_ms >= 1000 * after_s:
            # Whether the candidate fits it cannot be asked: it has not learned from what was left out.
            self.accept_stream("what is left out has kept coming")

    def _is_steady(self, faults: Sequence[Finding]) -> bool:
        """Whether a stream that differs from before has done so for long, and nothing else is wrong."""
        after_s, marks = self.config.accept_after_s, self._marks
        if after_s is None or marks.event_time_ms - marks.suspect_since_ms < 1000 * after_s:
            return False
        return all(fault.code == BASE_RATE for fault in faults)

    def _look(self) -> None:
        """Compare what came since the last suspicion with what is usual."""
        marks, total = self._marks, self._sample.total
        marks.looked_at = total
        length = self._sample.length(marks.suspect_from)
        if length < FEWEST or total == marks.trusted_until:
            return
        findings, look = self._history.compare(self._sample, length)
        if self.config.sift:
            findings += self._sifter.unusual(self._sample, length, self.config.z)
        if findings:
            if not self._suspicion:
                marks.suspect_since_ms = marks.event_time_ms
                _logger.warning("the stream is suspect: %s", reason_of(findings))
            needed = 2 * min(finding.examples for finding in findings)
            marks.needed = max(marks.needed, min(needed, self._sample.size // 2))
            marks.suspect_from = marks.trusted_until = total
            marks.is_open, marks.learned_suspect = 0, 1
            self._suspicion = findings
        elif not self._suspicion or length >= marks.needed:
            if self._suspicion:
                _logger.warning("the stream is as usual again, for %d sampled examples", length)
                self._suspicion, marks.needed = [], 0
                self._sifter.trust_tasks()
                marks.compared_from = marks.suspect_from
            new = self._sample.length(marks.trusted_until)
            self._history.accept(look, self._sample, new)
            self._sifter.learn(self._sample.newest(new))
            self._history.see(self._new_range)
            marks.trusted_until = total
        else:
            return
        self._new_range = _no_range(self._schema.num_numerics)

    def accept_stream(self, why: str) -> None:
        """Take the stream as it is now for the usual one."""
        _logger.warning("the stream that was suspect is accepted: %s", why)
        marks = self._marks
        self._history.forget()
        self._sifter.forget(why)
        self._suspicion, marks.needed, marks.is_open, marks.learned_suspect = [], 0, 1, 0
        marks.suspect_from = marks.trusted_until = marks.looked_at = self._sample.total

    @property
    def refuses(self) -> bool:
        """Whether the last cut was refused."""
        return self._marks.in_a_row > 0

    @property
    def in_a_row(self) -> int:
        """Cuts refused since one passed, or since the weights went back."""
        return self._marks.in_a_row

    def published(self, reference: Reference, step: int) -> None:
        """A cut goes out: the next ones are compared with it."""
        marks = self._marks
        self._replace(reference)
        marks.reference_step = step
        marks.compared_from = self._sample.total
        marks.is_open, marks.learned_suspect = int(not self._suspicion), 0

    def went_back(self, reference: Reference, step: int) -> None:
        """The weights are again those of the last cut that passed; ``step`` steps are behind them by number."""
        marks, to_step = self._marks, self._marks.reference_step
        self.backs = [*self.backs, WentBack(step, to_step, self.reason)][-_BACKS_KEPT:]
        marks.in_a_row = 0
        self.published(reference, to_step)
        # What comes until the stream is as usual again; what is sifted is suspect only if it looks so.
        marks.learned_suspect = int(bool(self._suspicion) and not self._sifter.is_on)

    def _replace(self, reference: Reference) -> None:
        if self.reference is not None:
            self.score_rest()
            self.reference.close()
        self.reference = reference

    # What is told and kept.

    def summary(self) -> dict[str, Any]:
        """Plain JSON values, for a manifest and the report."""
        marks = self._marks
        return {
            "passed": marks.passed,
            "refused": marks.refused,
            "refused_in_a_row": marks.in_a_row,
            "alarms": marks.alarms,
            "suspect": bool(self._suspicion),
            "reason": self.reason or None,
            "sifts": self._sifter.is_on,
            "left_out": self._sifter.left_out,
            "sampled": self._sample.total,
            "went_back": [asdict(back) for back in self.backs],
        }

    def state(self) -> Arrays:
        """Arrays from which :meth:`load_state` continues; those under ``reference.`` are not written to any more."""
        texts = {
            "suspicion": [asdict(finding) for finding in self._suspicion],
            "backs": [asdict(back) for back in self.backs],
            "reason": self.reason,
        }
        state: Arrays = {
            "marks": np.array(list(asdict(self._marks).values()), np.int64),
            "range": self._new_range,
            "texts": np.frombuffer(json.dumps(texts).encode(), np.uint8),
            **prefixed("sample.", self._sample.state()),
            **prefixed("history.", self._history.state()),
            **prefixed("sifter.", self._sifter.state()),
            **prefixed("open.", self._open.state()),
        }
        if self._unscored:
            blocks, scores = zip(*self._unscored, strict=True)
            state |= prefixed("unscored.", ExampleBlock.concat(blocks).arrays())
            state["unscored_live"] = np.concatenate(scores)
        if self.reference is not None:
            state |= prefixed("reference.", self.reference.state())
        return state

    def load_state(self, state: Arrays) -> None:
        """The inverse of :meth:`state`, in the learner's state of the same moment."""
        self._marks = Marks(*(int(n) for n in state["marks"]))
        self._new_range = state["range"].copy()
        texts = json.loads(state["texts"].tobytes())
        self._suspicion = [Finding(**finding) for finding in texts["suspicion"]]
        self.backs = [WentBack(**back) for back in texts["backs"]]
        self.reason = texts["reason"]
        self._sample.load_state(under("sample.", state))
        self._history.load_state(under("history.", state))
        self._sifter.load_state(under("sifter.", state))
        self._open.load_state(under("open.", state))
        unscored = under("unscored.", state)
        self._unscored = [(ExampleBlock(**unscored), state["unscored_live"])] if unscored else []
        reference = under("reference.", state)
        self.reference = self._thaw(reference) if reference else None


def _no_range(features: int) -> F64:
    return np.stack([np.full(features, np.inf), np.full(features, -np.inf)])
