"""Mean and deviation of numeric features over the stream: no single value decides them, a lasting change is followed.

Letters: B instances, F numeric features, K recent values.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numba import njit

from smes.arrays import F32, F64, Arrays
from smes.schema import Schema

if TYPE_CHECKING:
    from smes.joint_batch import JointBatch

CLIP = 8.0
"""Standardised values are clipped here, those that the model reads and those that count for the moments."""

FAR: dict[str, tuple[float, float]] = {"none": (2.0**20, 2.0**20), "log1p": (80 * math.log(2), CLIP)}
"""Transform → (least distance from zero, least deviations from the mean), both after it, of a *far* value.

That is one which nothing measures: a million, and a million deviations away; for a logarithm, 10²⁴. It counts for no
moment, and the model reads it as missing.
"""

KNOWN_FROM = 256
"""Moments of fewer values cannot tell what is far."""

_HORIZON = 1e6  # from so many values on, old ones fade out
_LARGEST = 3e38
_RECENT = KNOWN_FROM  # K
_GAP_FACTOR, _GAP_OF_LOG = 2.0**20, 40 * math.log(2)  # far ones of the recent values begin after such a step
_STRIDE = 8  # one value in so many is kept once there are K
_COMPARED = 512  # values between two comparisons, once there are K
_TRIMMED = 64  # a 64th of the recent values at each end says nothing about the spread
_FENCE = 4.0  # times the distance from the median to the rest: 8.6 deviations of a normal distribution
_SPARSE = 8  # all but an eighth of the recent values are equal
_OUTSIDE = 8  # an eighth of the recent values lies outside
_SHIFTED = 2.0  # deviations; the median of a distribution lies within one of its mean
_SHRUNK = 16.0
_YOUNG = 4096


class NumericMoments:
    """Running moments that an extreme value hardly moves; on the host, whatever the training device.

    A value counts as if it lay within 8 deviations of the mean that is known. So one of 10⁹ among 10,000 values of
    20 ± 5 makes the deviation 0.3 % larger, and not two million times.

    By this rule alone, a feature whose scale changes for good would be followed too slowly. So the last values are kept
    as well: the first 256, then one in 8. Of them a 64th at each end is left out, to find fences around the rest. The
    moments start anew, from the recent values between the fences, where the two contradict each other:

    - an eighth of the recent values lies more than 8 deviations from the mean, or their median more than 2 (in a
      distribution it cannot be more than 1);
    - the recent deviation is 16 times smaller while few values were seen: then an early outlier, or the old values
      around a change, made the moments;
    - the recent deviation and the recent distance from zero are both 16 times smaller, and were so for an eighth of all
      values that the moments know: the unit has changed. (A feature that stands still for a while, as the hour of the
      day does, keeps its moments.)

    So a change is followed within about 2,500 values, or within an eighth of those known if the scale became smaller.

    The moments of few values, or of a constant, cannot tell what is extreme; the fences do. A feature that nearly
    always has the same value may go as far as its fences, too.

    Clipping bounds what one value does, not what a twentieth of all does: each would widen what the next may add. So
    values that nothing measures (:data:`FAR`) do not count at all. The recent ones are found without the moments, by a
    gap: with a step from one distance from the median to the next of a factor 2²⁰ (2⁴⁰ for a logarithm), and fewer than
    half beyond it. If half of the recent values are beyond it, they are what the feature is now.

    Values count one after the other: how the stream is cut into batches makes no difference.

    Args:
        schema: Its inputs' numeric features.
    """

    def __init__(self, schema: Schema) -> None:
        schema = schema.inputs
        shape = schema.num_numerics
        self._log1p_F = np.array([f.transform == "log1p" for f in schema.numeric_features], np.bool_)
        self._far_F2 = far_limits(schema)
        self._moments: dict[str, F64] = {
            "count": np.zeros(shape),
            "mean": np.zeros(shape),
            "variance": np.ones(shape),
        }
        self._kept: Arrays = {
            "values": np.zeros((shape, _RECENT)),
            "seen": np.zeros(shape, np.int64),
            "low": np.full(shape, -np.inf),
            "high": np.full(shape, np.inf),
            "sparse": np.zeros(shape, np.bool_),
            "shrunk": np.zeros(shape, np.int64),
        }

    def observe(self, numerics_BF: F32, batch: "JointBatch | None" = None) -> None:
        """Take in a batch. float32 [B, F], NaN where missing.

        Args:
            numerics_BF: Of several ranks, this one's part.
            batch: The batch of all ranks, whose rows count in the order of the ranks; None: there is one rank.
        """
        if batch is None:
            self._observe(numerics_BF, slice(None))
        elif numerics_BF.shape[1]:
            self._observe_joint(numerics_BF, batch)

    def _observe(self, numerics_BF: F32, features: slice) -> None:
        constants, state = (self._log1p_F, self._far_F2), (*self._moments.values(), *self._kept.values())
        _observe(numerics_BF, *(column[features] for column in (*constants, *state)))

    def _observe_joint(self, numerics_BF: F32, batch: "JointBatch") -> None:
        """Each rank takes in the columns of some features, of all ranks, and tells the others what it then knows."""
        world, features = batch.world, numerics_BF.shape[1]
        ends_N = [features * (rank + 1) // world.size for rank in range(world.size)]
        of_ranks = [slice(start, end) for start, end in zip([0, *ends_N], ends_N, strict=False)]
        own = of_ranks[world.rank]
        columns_N = [numerics_BF[:, some].reshape(-1) for some in of_ranks]
        width = own.stop - own.start
        coming_N = [width * rows for rows in batch.observed_N]
        values = batch.trade(np.concatenate(columns_N), [len(columns) for columns in columns_N], coming_N)
        if width:
            self._observe(values.reshape(-1, width), own)
        state = [array.reshape(features, -1) for array in (*self._moments.values(), *self._kept.values())]
        known_FX = np.concatenate([array[own] for array in state], axis=1, dtype=np.float64)
        known_FX = batch.gathered(known_FX, [some.stop - some.start for some in of_ranks])
        ends = np.cumsum([array.shape[1] for array in state])[:-1]
        for array, part in zip(state, np.split(known_FX, ends, axis=1), strict=True):
            array[...] = part  # whole numbers up to 2⁵³ are the same in float64

    @property
    def moments(self) -> dict[str, F64]:
        """``count``, ``mean`` and ``variance`` of the transformed values; views. float64 [F] each."""
        return self._moments

    def state(self) -> Arrays:
        """What training needs besides the moments; copies."""
        return {name: array.copy() for name, array in self._kept.items()}

    def load(self, moments: Mapping[str, F64], state: Arrays) -> None:
        """Continue from :attr:`moments` and a :meth:`state`, or from moments alone if ``state`` is empty.

        Raises:
            KeyError: An array is missing.
            RuntimeError: One is of another shape.
        """
        fresh = not state
        for own, given in ((self._moments, moments), (self._kept, state)):
            for name, array in own.items():
                if fresh and own is self._kept:
                    continue
                if given[name].shape != array.shape:
                    raise RuntimeError(
                        f"numerics.{name}: shape {list(given[name].shape)}, expected {list(array.shape)}"
                    )
                array[...] = given[name]


def far_limits(schema: Schema) -> F64:
    """:data:`FAR` of each numeric feature. float64 [F, 2]."""
    return np.array([FAR[f.transform] for f in schema.numeric_features], np.float64).reshape(-1, 2)


@njit(cache=True, nogil=True)
def _observe(  # type: ignore[no-untyped-def]  # compiled, and called in one place
    numerics_BF, log1p_F, far_F2, count_F, mean_F, variance_F, values_FK, seen_F, low_F, high_F, sparse_F, shrunk_F
):  # pragma: no cover - compiled
    for f in range(numerics_BF.shape[1]):
        count, mean, variance = count_F[f], mean_F[f], variance_F[f]  # locals: ten times as fast as the arrays
        for b in range(numerics_BF.shape[0]):
            x = float(numerics_BF[b, f])
            if math.isnan(x):
                continue
            x = min(max(x, -_LARGEST), _LARGEST)
            if log1p_F[f]:
                x = math.copysign(math.log1p(abs(x)), x)
            low, high, is_far, index = low_F[f], high_F[f], False, seen_F[f]
            if max(count, index) >= _RECENT and variance > 0:
                is_far = abs(x) > far_F2[f, 0] and abs(x - mean) > far_F2[f, 1] * math.sqrt(variance)
            if count >= _RECENT and variance > 0:
                reach = CLIP * math.sqrt(variance)
                low = min(low, mean - reach) if sparse_F[f] else mean - reach
                high = max(high, mean + reach) if sparse_F[f] else mean + reach
            if not is_far:
                difference, share = min(max(x, low), high) - mean, 1.0 / (count + 1.0)
                # For the first value the share is 1, so the initial variance of 1 drops out.
                variance = (1.0 - share) * (variance + share * difference * difference)
                mean += share * difference
                count = min(count + 1.0, _HORIZON)
            seen_F[f] += 1
            if index < _RECENT:
                values_FK[f, index] = x
            elif index % _STRIDE == 0:
                values_FK[f, index // _STRIDE % _RECENT] = x
            every = _COMPARED if index >= _RECENT else _STRIDE
            if index + 1 >= _TRIMMED and (index + 1) % every == 0:
                count_F[f], mean_F[f], variance_F[f] = count, mean, variance
                held = min(seen_F[f], _RECENT)
                recent = _near(np.sort(values_FK[f, :held]), log1p_F[f], far_F2[f, 0])
                anew = index < _RECENT and len(recent) < held  # far values were counted
                _compare(f, recent, every, anew, count_F, mean_F, variance_F, low_F, high_F, sparse_F, shrunk_F)
                count, mean, variance = count_F[f], mean_F[f], variance_F[f]
        count_F[f], mean_F[f], variance_F[f] = count, mean, variance


@njit(cache=True, nogil=True)
def _near(recent, is_log, least):  # type: ignore[no-untyped-def]  # as above
    # pragma: no cover - compiled
    """Those of the recent values, in order, that are not far; all of them unless there is a gap."""
    median = recent[(len(recent) - 1) // 2]
    distances = np.sort(np.abs(recent - median))
    for i in range(len(distances) // 2, len(distances) - 1):
        rest, further = distances[i], distances[i + 1]
        gap = further - rest > _GAP_OF_LOG if is_log else further > _GAP_FACTOR * rest
        if rest > 0 and gap and further > least:
            return recent[np.abs(recent - median) <= rest]
    return recent


@njit(cache=True, nogil=True)
def _compare(  # type: ignore[no-untyped-def]  # as above
    f, recent, new, anew, count_F, mean_F, variance_F, low_F, high_F, sparse_F, shrunk_F
):  # pragma: no cover - compiled
    """Compare the moments of a feature with its recent values, in order; start anew from these if they contradict."""
    held, trimmed = len(recent), len(recent) // _TRIMMED
    median = recent[(held - 1) // 2]
    low = low_F[f] = median - _FENCE * (median - recent[trimmed])
    high = high_F[f] = median + _FENCE * (recent[held - 1 - trimmed] - median)
    deviation = math.sqrt(max(variance_F[f], 1e-24 * mean_F[f] * mean_F[f] + 1e-60))  # as standardised by
    others = outside = 0
    shift = squares = 0.0
    for x in recent:
        others += x != median
        outside += abs(x - mean_F[f]) > CLIP * deviation
        difference = min(max(x, low), high) - median
        shift += difference / held
        squares += difference * difference / held
    sparse_F[f] = others * _SPARSE < held
    mean, variance = median + shift, max(squares - shift * shift, 0.0)
    narrow = 0 < variance * _SHRUNK**2 < variance_F[f]
    near = (mean * mean + variance) * _SHRUNK**2 < mean_F[f] * mean_F[f] + variance_F[f]
    shrunk_F[f] = shrunk_F[f] + new if narrow and near else 0
    if (
        anew
        or outside * _OUTSIDE >= held
        or abs(median - mean_F[f]) > _SHIFTED * deviation
        or (narrow and count_F[f] < _YOUNG)
        or shrunk_F[f] >= max(count_F[f] / 8, _STRIDE * _RECENT)
    ):
        count_F[f], mean_F[f], variance_F[f], shrunk_F[f] = held, mean, variance, 0
