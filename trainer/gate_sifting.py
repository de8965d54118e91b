"""While a stream is suspect, the examples that are unlike any of a trusted stretch teach nothing.

Labels of a task that is suspect as a whole teach nothing either, until the stream is as usual again.

An example is implausible if its log loss under the version in service, summed over the binary tasks, lies beyond what
all but a thousandth of the trusted history had. A flipped example is wrong in all its rare labels at once. Only a
version that does not change can tell: weights that learn what slips through soon find the good examples implausible.

Letters: N examples, T tasks.
"""

import logging
from dataclasses import replace

import numpy as np

from smes.arrays import F32, F64, I64, Arrays, Bool, prefixed, under
from smes.events import ExampleBlock
from trainer.gate_findings import STREAM_IMPLAUSIBLE, Finding
from trainer.gate_sample import Examples, SampledStretch
from trainer.gate_statistics import UsualNoise, losses, signed_deviance
from trainer.gate_stream import FEWEST

_logger = logging.getLogger(__name__)

_BINS, _A_NAT = 512, 8  # of the histogram: so many, so many to a nat
_QUANTILE = 0.999
_LONG_RUN = 8  # stretches that the histogram remembers
_MOST_OF_A_BATCH = 0.5
_QUIET = 2  # windows in a row, before it ends
_TIMES_USUAL, _A_FEW = 3.0, 4  # of a window's examples: what is usual
_LATE = 16  # looks, until one counts
_TAILS = (64, 16, 4)  # parts of a stretch, the newest of which are looked at
_FEWEST_BEYOND, _FEWEST_TO_TELL = 1, 10  # trusted examples beyond the limit: to leave out by it; to be suspect by it


def surprise(scores: F32, labels: F32, mask: Bool, binary: Bool) -> F64:
    """Log loss summed over the binary tasks that have a label, in nats. [N, T] each, bool [T] → float64 [N]."""
    counted = mask[:, binary] & np.isfinite(scores[:, binary])
    each = losses(np.where(counted, scores[:, binary], 0.5), np.where(counted, labels[:, binary], 0.0), binary=True)
    result: F64 = np.where(counted, each, 0.0).sum(axis=1)
    return result


class Sifter:
    """Finds what is implausible, from the beginning of a suspicion until little has been implausible for long enough.

    It begins and ends only where cuts are judged, so that a restart finds the same.

    Args:
        binary: bool [T], which tasks are binary.
        stretch: Sampled examples of a stretch.

    Attributes:
        is_on: Whether it sifts.
        since_ms: Event time at which it began.
        left_out: Impressions that taught nothing so far.
        begun: How often it began.
    """

    def __init__(self, binary: Bool, stretch: int) -> None:
        self._binary, self._stretch = binary, stretch
        self._histogram: F64 = np.zeros(_BINS)
        self._newest: F64 = np.zeros((2, _BINS))  # what came last counts later: it may be what is suspect soon
        self._noise = UsualNoise(len(_TAILS))
        self._z: F64 | None = None  # of the tails in the last look
        self._late: F64 = np.zeros((0, len(_TAILS)))  # of the looks before it: they count late, too
        self._limit = np.inf
        self._users = np.zeros(0, np.int64)
        self._suspect: Bool = np.zeros(len(binary), np.bool_)  # tasks whose labels teach nothing
        self._rows = self._out = self._quiet = 0  # of the present window; windows
        self.is_on = False
        self.since_ms = self.left_out = self.begun = self._left_out_before = 0

    def learn(self, trusted: Examples) -> None:
        """Take in what is usual. While it sifts it takes in nothing: what is left is cut off."""
        if self.is_on:
            return
        if self._z is not None:
            self._late = np.concatenate([self._late, self._z[None]])
            for i, z in enumerate(self._late[0] if len(self._late) > _LATE else ()):
                self._noise.learn(i, z)
            self._late = self._late[-_LATE:]
        nats = surprise(trusted.served, trusted.labels, trusted.mask, self._binary)
        place = np.minimum((nats * _A_NAT).astype(np.int64), _BINS - 1)
        self._newest[1] += np.bincount(place, minlength=_BINS)
        if (new := self._newest[1].sum()) >= self._stretch // 8:
            self._histogram *= np.exp(-new / (_LONG_RUN * self._stretch))
            self._histogram += self._newest[0]
            self._newest = np.stack([self._newest[1], np.zeros(_BINS)])

    def unusual(self, sample: SampledStretch, length: int, z: float) -> list[Finding]:
        """Whether too many of the newest sampled examples are implausible, in any of their tails.

        Standard errors grow with how well the limit is known, and with how much the same count has varied so far.

        Args:
            sample: The examples.
            length: How many of the newest, ≥ 1.
            z: Standard errors that count.
        """
        limit, self._z = self._beyond_all_but_few(_FEWEST_TO_TELL), None
        if self.is_on or limit is None:
            return []
        newest = sample.newest(min(length, self._stretch // 4))
        beyond = surprise(newest.served, newest.labels, newest.mask, self._binary) > limit
        tails = [beyond[-max(FEWEST, self._stretch // part) :] for part in _TAILS]
        n = np.array([float(len(tail)) for tail in tails])
        found, usual = np.array([float(np.count_nonzero(tail)) for tail in tails]), (1 - _QUANTILE) * n
        self._z = signed_deviance(found, usual, n) / np.sqrt(1 + n / self._histogram.sum())
        off = self._z / np.array([self._noise.errors(i) for i in range(len(_TAILS))])
        for i in np.flatnonzero((found >= _A_FEW) & (off > z) & (found > _TIMES_USUAL * usual))[:1]:
            text = f"{found[i]:.0f} of {n[i]:.0f} examples have a loss beyond {limit:.1f} nats, usual {usual[i]:.1f}"
            return [Finding(STREAM_IMPLAUSIBLE, "", text, int(n[i]))]
        return []

    def _beyond_all_but_few(self, fewest: int) -> float | None:
        """The quantile of the trusted history; None while fewer examples than these lie beyond it."""
        total = np.cumsum(self._histogram)
        if total[-1] * (1 - _QUANTILE) < fewest:
            return None
        return (int(np.searchsorted(total, _QUANTILE * total[-1])) + 1) / _A_NAT

    def begin(self, event_time_ms: int) -> None:
        """Sift from now on."""
        limit = self._beyond_all_but_few(_FEWEST_BEYOND)
        if self.is_on or limit is None:
            return
        self._limit = limit
        self._newest[:], self._late = 0, self._late[:0]
        self._rows = self._out = self._quiet = 0
        self.is_on, self.since_ms, self._left_out_before = True, event_time_ms, self.left_out
        self.begun += 1
        _logger.warning("examples with a loss beyond %.1f nats teach nothing from now on", self._limit)

    def end(self, why: str) -> None:
        """Sift no more."""
        if self.is_on:
            left_out = self.left_out - self._left_out_before
            _logger.warning("every example teaches again: %s; %d taught nothing", why, left_out)
        self.is_on, self._limit, self._users = False, np.inf, np.zeros(0, np.int64)
        self.trust_tasks()

    def forget(self, why: str) -> None:
        """Sift no more, and begin anew: what comes next is what is usual."""
        self.end(why)
        self._histogram, self._newest = np.zeros(_BINS), np.zeros((2, _BINS))
        self._noise, self._late = UsualNoise(len(_TAILS)), np.zeros((0, len(_TAILS)))

    def leave_out(self, users: I64) -> None:
        """Leave out the examples of these users, until sifting ends."""
        self._users = np.union1d(self._users, users)

    def leave_out_tasks(self, suspect: Bool) -> bool:
        """Leave out the labels of these tasks, too, until :meth:`trust_tasks`. Whether there is a new one. bool [T]."""
        is_new = bool((suspect & ~self._suspect).any())
        self._suspect = self._suspect | suspect
        return is_new

    def trust_tasks(self) -> None:
        """Let the labels of all tasks teach again."""
        self._suspect = np.zeros_like(self._suspect)

    def plausible(self, users: I64, scores: F32, labels: F32, mask: Bool) -> Bool:
        """Which examples are to be believed: all of them unless it sifts. bool [N]."""
        if not self.is_on:
            return np.ones(len(users), np.bool_)
        beyond = surprise(scores, labels, mask, self._binary) > self._limit
        return ~(beyond | np.isin(users, self._users))

    def sift(self, examples: ExampleBlock, served: F32) -> ExampleBlock:
        """The examples of a batch; what is left out has weight 0. The same object if nothing is.

        Where most of a batch is implausible, all of it is left out: a few examples must not weigh as much as a batch.
        """
        kept = self.plausible(examples.user_id, served, examples.labels, examples.label_mask)
        self._rows += len(kept)
        self._out += int(np.count_nonzero(~kept))
        if self._suspect.any():
            examples = replace(examples, label_mask=examples.label_mask & ~self._suspect)
        if kept.all():
            return examples
        if np.count_nonzero(~kept) > _MOST_OF_A_BATCH * len(kept):
            kept[:] = False
        self.left_out += int(np.count_nonzero(~kept & examples.begins))
        return replace(examples, weight=np.where(kept, examples.weight, np.float32(0)))

    def end_if_quiet(self) -> None:
        """End it if no more than the usual share was implausible, in each of the last windows."""
        if not self.is_on or self._rows < self._stretch // 4:
            return
        usual = _TIMES_USUAL * (1 - _QUANTILE) * self._rows + _A_FEW
        self._quiet = self._quiet + 1 if self._out <= usual else 0
        self._rows = self._out = 0
        if self._quiet >= _QUIET:
            self.end("hardly one has been implausible for a while")

    def state(self) -> Arrays:
        """Copies of the arrays from which :meth:`load_state` goes on."""
        numbers = (
            self.is_on,
            self.since_ms,
            self.left_out,
            self.begun,
            self._left_out_before,
            self._rows,
            self._out,
            self._quiet,
        )
        return {
            **prefixed("noise.", self._noise.state()),
            "late": self._late.copy(),
            "histogram": self._histogram.copy(),
            "newest": self._newest.copy(),
            "limit": np.array([self._limit]),
            "users": self._users.copy(),
            "suspect": self._suspect.copy(),
            "numbers": np.array(numbers, np.int64),
        }

    def load_state(self, state: Arrays) -> None:
        """The inverse of :meth:`state`."""
        self._noise.load_state(under("noise.", state))
        self._late = state["late"].copy()
        self._histogram, self._users = state["histogram"].copy(), state["users"].copy()
        self._suspect = state["suspect"].copy()
        self._newest, self._limit = state["newest"].copy(), float(state["limit"][0])
        is_on, *numbers = (int(n) for n in state["numbers"])
        self.is_on = bool(is_on)
        self.since_ms, self.left_out, self.begun, self._left_out_before, self._rows, self._out, self._quiet = numbers
