"""Whether the newest stretch of a stream is like the stretches before it.

The version in service scores what comes before anybody has learned from it. When its scores suddenly fit much worse,
it is the stream that has changed, and what is learned from it now is not to be trusted yet.

Letters: N examples, T tasks, K tails of a stretch, F numeric features.
"""

from collections.abc import Sequence

import numpy as np

from smes.arrays import F32, F64, I64, Arrays, Bool, prefixed, under
from smes.model.numeric_moments import FAR
from smes.schema import Schema
from trainer.config import GateConfig
from trainer.gate_findings import (
    STREAM_BASE_RATE,
    STREAM_CALIBRATION,
    STREAM_INPUTS,
    STREAM_RANKING,
    STREAM_USER,
    Finding,
)
from trainer.gate_sample import SampledStretch
from trainer.gate_statistics import (
    SLOWEST,
    SUMS,
    N,
    P,
    UsualNoise,
    V,
    Y,
    is_beyond,
    largest_shares,
    odds_ratio,
    signed_deviance,
    slope,
)

FEWEST = 32
"""Sampled examples of a stretch that is judged at all."""

_CALIBRATION, _RANKING, _BASE_RATE, _TESTS = range(4)
_FEWEST_EXPECTED = 10  # examples of each class
_FEWEST_OF_ONE = 16  # examples that one user, or one odd feature, has to have
_LONG_RUN = 8  # stretches that the history remembers
_FAR_WIDTHS = 2.0**20


class StreamHistory:
    """What was usual so far, and the comparison with it.

    Each statistic has three bounds: it has to differ by more than a margin, by more than ``z`` standard errors, and the
    standard errors grow with how much the same statistic, over stretches as long as this one, has varied so far.

    Args:
        schema: Tasks and numeric features.
        config: Margins.

    Attributes:
        binary: bool [T], which tasks are binary.
        names: The tasks' names.
    """

    def __init__(self, schema: Schema, config: GateConfig) -> None:
        self._schema, self._config = schema, config
        self.binary: Bool = np.array([task.kind == "binary" for task in schema.tasks])
        most = config.stretch_examples
        self._lengths = [max(FEWEST, most // part) for part in (64, 16, 4, 1)]
        self.names = [task.name for task in schema.tasks]
        limits = {"none": FAR["none"][0], "log1p": np.exp(FAR["log1p"][0])}
        self._nothing_measures = np.array([limits[f.transform] for f in schema.numeric_features])
        self.forget()

    def forget(self) -> None:
        """Begin anew: what comes next is what is usual."""
        tasks, tails = len(self.names), len(self._lengths)
        self._sums: F64 = np.zeros((SUMS, tasks))
        self._noise = UsualNoise(tails, (_TESTS, tasks))
        self._accepted = 0  # looks
        self._shares: F64 = np.zeros((tails, tasks + 2))  # of one user: in all examples, in positives; odd inputs
        self._range: F64 = np.stack(
            [np.full(self._schema.num_numerics, np.inf), np.full(self._schema.num_numerics, -np.inf)]
        )

    @property
    def examples(self) -> float:
        """Sampled examples remembered; the older ones count less."""
        return float(self._sums[N].max(initial=0.0))

    @property
    def knows(self) -> bool:
        """Whether there is enough to compare with."""
        return self.examples >= self._config.warm_up_examples

    def base_rate(self) -> F64:
        """Mean label of each task; NaN before the first. float64 [T]."""
        with np.errstate(invalid="ignore", divide="ignore"):
            rate: F64 = self._sums[Y] / self._sums[N]
        return rate

    def odd(self, numerics: F32) -> Bool:
        """Which examples have a numeric feature that is far out of its range. [N, F] → bool [N].

        One that is so far that the model reads it as missing does no harm and does not count
        (:data:`smes.model.numeric_moments.FAR`).
        """
        low, high = self._range
        known = (high >= low) & self.knows
        with np.errstate(invalid="ignore", over="ignore"):
            x = numerics.astype(np.float64)
            width = np.maximum(high - low, np.abs(high) * 1e-3 + 1e-9)
            beyond = np.maximum(x - high, low - x)
            missing = (np.abs(x) >= self._nothing_measures) & (beyond > _FAR_WIDTHS * width)
            outside = known & (beyond > self._config.max_range * width) & ~missing
        result: Bool = outside.any(axis=1)
        return result

    def see(self, low_high: F64) -> None:
        """Widen the ranges by the smallest and the largest usual values of a trusted stretch. float64 [2, F]."""
        self._range[0], self._range[1] = np.fmin(self._range[0], low_high[0]), np.fmax(self._range[1], low_high[1])

    def compare(self, sample: SampledStretch, length: int) -> tuple[list[Finding], "Look"]:
        """What is unusual about the newest examples, by their tails; what :meth:`accept` takes in if nothing is.

        Args:
            sample: The examples.
            length: How many of the newest, ≥ 1.
        """
        lengths = [shorter for shorter in self._lengths if shorter < length] + [length]
        lengths = lengths[-len(self._lengths) :]
        places = [int(np.searchsorted(self._lengths, length)) for length in lengths]
        places = [min(place, len(self._lengths) - 1) for place in places]
        examples, sums = sample.newest(length), sample.tail_sums(lengths)
        most, total = largest_shares(examples.user, examples.mask & (examples.labels > 0), lengths)
        odd = np.array([int(examples.odd[-length:].sum()) for length in lengths])
        z = np.zeros((len(lengths), _TESTS, len(self.names)))
        look = Look(places, z, most, total, odd, np.array(lengths))
        findings: list[Finding] = []
        for i, place in enumerate(places):
            findings += self._compare_labels(sums[i], place, look.z[i])
            findings += self._compare_shares(look, i)
        return findings if self.knows else [], look

    def _compare_labels(self, s: F64, place: int, z_out: F64) -> list[Finding]:
        """Findings of one tail's sums; the z of each test is written to ``z_out``."""
        config, h, n = self._config, self._sums, s[N]
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = np.where(h[P] > 0, h[Y] / h[P], 1.0)
            expected, usual = ratio * s[P], self.base_rate() * n
            expected, usual = np.where(self.binary, np.minimum(expected, n), expected), np.nan_to_num(usual)
            drift = np.sqrt(1 + n / np.maximum(h[N], 1.0))
            spread = np.sqrt(np.maximum(s[V], 1e-30))
            z_out[_CALIBRATION] = np.where(self.binary, signed_deviance(s[Y], expected, n), (s[Y] - expected) / spread)
            z_out[_BASE_RATE] = np.where(self.binary, signed_deviance(s[Y], usual, n), (s[Y] - usual) / spread)
            score, information, variance = slope(s)
            past_score, past_information, _ = slope(h)
            past = np.where(past_information > 0, past_score / past_information, 0.0)
            steeper = np.where(information > 0, score / information - past, 0.0)
            error = np.sqrt(np.maximum(variance * (1 + information / np.maximum(past_information, 1e-9)), 1e-30))
            z_out[_RANKING] = np.where(variance > 0, (score - past * information) / error, 0.0)
            z_out[[_CALIBRATION, _BASE_RATE]] /= drift
            z = z_out / self._noise.errors(place)
            shift = np.where(self.binary, odds_ratio(s[Y], expected, n), s[Y] / np.maximum(expected, 1e-9))
            jump = np.where(self.binary, odds_ratio(s[Y], usual, n), s[Y] / np.maximum(usual, 1e-9))
        both = np.where(self.binary, np.minimum(expected, n - expected), n)
        counted = np.where(self.binary, np.maximum(s[Y], expected), n) >= _FEWEST_EXPECTED
        findings = []
        for t, name in enumerate(self.names):
            if not counted[t]:
                continue
            if abs(z[_CALIBRATION, t]) > config.z and is_beyond(shift[t], config.max_shift):
                text = f"labels sum to {s[Y][t]:.4g}, the version in service expected {expected[t]:.4g}"
                findings.append(self._finding(STREAM_CALIBRATION, name, text, n[t], z[_CALIBRATION, t]))
            if abs(z[_BASE_RATE, t]) > config.z and is_beyond(jump[t], config.max_base_rate_ratio):
                text = f"labels sum to {s[Y][t]:.4g}, usual {usual[t]:.4g}"
                findings.append(self._finding(STREAM_BASE_RATE, name, text, n[t], z[_BASE_RATE, t]))
            if z[_RANKING, t] < -config.z and steeper[t] < -config.max_slope_drop and both[t] >= _FEWEST_EXPECTED:
                text = f"the version in service ranks worse: slope lower by {-steeper[t]:.2f}"
                findings.append(self._finding(STREAM_RANKING, name, text, n[t], z[_RANKING, t]))
        return findings

    def _finding(self, code: str, name: str, text: str, n: float, z: float) -> Finding:
        return Finding(code, name, f"{text} ({n:.0f} examples, z {z:.1f})", int(n))

    def _compare_shares(self, look: "Look", i: int) -> list[Finding]:
        config, findings, length = self._config, [], int(look.lengths[i])
        usual = self._shares[look.places[i]]
        names = ["examples", *self.names]
        for column, name in enumerate(names):
            most, total = int(look.most[i, column]), int(look.total[i, column])
            if most >= _FEWEST_OF_ONE and most / total > max(config.max_user_share, 3 * usual[column]):
                what = "examples" if column == 0 else "positives"
                text = f"one user has {most} of {total} {what}, usual at most {usual[column]:.2%}"
                findings.append(Finding(STREAM_USER, "" if column == 0 else name, text, length))
        odd = int(look.odd[i])
        if odd >= _FEWEST_OF_ONE // 2 and odd / length > max(config.max_odd_share, 3 * usual[-1]):
            findings.append(
                Finding(STREAM_INPUTS, "", f"{odd} of {length} examples have values far out of range", length)
            )
        return findings

    def flooding(self, sample: SampledStretch) -> I64:
        """Users who have more than their share, of the examples or of a task's positives, in one of the tails."""
        found = [np.zeros(0, np.int64)]
        for place, tail in enumerate(self._lengths):
            examples = sample.newest(min(tail, sample.length(0)))
            positive = examples.mask & (examples.labels > 0)
            users, number = np.unique(examples.user, return_inverse=True)
            for column in range(1 + len(self.names)):
                counted = number if column == 0 else number[positive[:, column - 1]]
                counts = np.bincount(counted, minlength=len(users))
                most = max(self._config.max_user_share, 3 * self._shares[place, column]) * len(counted)
                found.append(users[(counts >= _FEWEST_OF_ONE) & (counts > most)])
        return np.unique(np.concatenate(found))

    def accept(self, look: "Look", sample: SampledStretch, new: int) -> None:
        """Take in a look that found nothing; ``new`` of the sample's newest examples were in none before."""
        self._accepted += 1
        for i, place in enumerate(look.places):
            if self.knows:
                self._noise.learn(place, look.z[i])
            with np.errstate(invalid="ignore", divide="ignore"):
                shares = np.where(look.most[i] >= _FEWEST_OF_ONE // 4, look.most[i] / look.total[i], 0.0)
            shares = np.append(shares, look.odd[i] / look.lengths[i])
            # An average: it must not follow a flood that rises from look to look.
            self._shares[place] += max(1.0 / self._accepted, SLOWEST) * (shares - self._shares[place])
        kept = np.exp(-new / (_LONG_RUN * self._config.stretch_examples))
        self._sums = kept * self._sums + sample.tail_sums([new])[0]

    def state(self) -> Arrays:
        """Copies of the arrays from which :meth:`load_state` goes on."""
        return {
            "sums": self._sums.copy(),
            **prefixed("noise.", self._noise.state()),
            "shares": self._shares.copy(),
            "range": self._range.copy(),
            "accepted": np.array([self._accepted]),
        }

    def load_state(self, state: Arrays) -> None:
        """The inverse of :meth:`state`."""
        self._noise.load_state(under("noise.", state))
        self._sums, self._shares = state["sums"].copy(), state["shares"].copy()
        self._range, self._accepted = state["range"].copy(), int(state["accepted"][0])


class Look:
    """What one comparison computed."""

    def __init__(self, places: Sequence[int], z: F64, most: I64, total: I64, odd: I64, lengths: I64) -> None:
        self.places, self.z = places, z
        self.most, self.total, self.odd, self.lengths = most, total, odd, lengths
