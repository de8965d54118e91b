"""Worlds with rare tasks: base rates fall from 45 % (task 0) to 0.1 % (task 7), and tasks have something in common.

Users, items, features and requests are those of :mod:`benchmarks.worlds`. The logit of task t is

``bias_t + 0.5·pop_i + 0.5·g(v; C_t) + 1.3·g(v; M_r, w_{t,r})``, ``g(v; (M, w)) = w·tanh(Mᵀv)``

where r is the regime of the user (a segment of 32) or of the item (a category of 32). Here the tasks that follow the
same side *share M_r*, what matters in a regime, and differ in how they weigh it: ``w_{t,r} = (u_r + d_{t,r}) / |…|``,
u and d normal of 4 numbers, so that two tasks of a side agree by half (the mean cosine of their w is near 0.5). So what
is rare can be learned from what is not. With 2,000 positives no task could learn 32 regimes of its own.

A task that *needs* another one is positive only where that one is, and then with the probability that its logit says:
P(follow) = P(profile) · P(follow | profile). Its base rate is that of both. In ``rare_nested`` the task that is needed
follows the user's segment, and what needs it follows the item's category.

The worlds were written down before any ranker was tried on them, and are not tuned.
Letters: N instances, T tasks, R regimes, L latent numbers, H hidden ones, O tasks of one side.
"""

import numpy as np

from benchmarks.worlds import COMMON, F64, HIDDEN, I64, NUM_TASKS, REGIME, Reader, World, WorldSpec, draw_m

RARE_WORLDS: dict[str, WorldSpec] = {
    "rare_shared": WorldSpec(segments=32, least_rate=0.001),
    "rare_conflict": WorldSpec(segments=32, categories=32, by_category=(1, 3, 5, 7), least_rate=0.001),
    "rare_nested": WorldSpec(
        segments=32, categories=32, by_category=(4, 5, 7), least_rate=0.001, needs={4: 1, 5: 2, 7: 3}
    ),
}
"""``rare_shared``: all tasks follow the segment. ``rare_conflict``: every second one follows the category."""


class RareWorld(World):
    """A world in which the tasks of one side share what matters in a regime. Arguments as of :class:`World`."""

    def _draw_readings(self, rng: np.random.Generator) -> None:
        spec = self._spec
        w_THO = np.zeros((NUM_TASKS, HIDDEN, NUM_TASKS))
        for t in range(NUM_TASKS):
            w_THO[t, :, t] = _unit(rng.normal(size=HIDDEN))
        self._of_all = Reader(draw_m(rng, 1, NUM_TASKS * HIDDEN), w_THO.reshape(1, -1, NUM_TASKS))
        self._by_category = [t for t in range(NUM_TASKS) if t in spec.by_category]
        self._by_segment = [t for t in range(NUM_TASKS) if t not in spec.by_category]
        self._segments = _draw_side(rng, spec.segments, len(self._by_segment))
        self._categories = _draw_side(rng, spec.categories, len(self._by_category))

    def _read(self, v_NL: F64, segment_N: I64, category_N: I64) -> F64:
        read_NT = COMMON * self._of_all(v_NL, np.zeros(len(v_NL), np.int64))
        read_NT[:, self._by_segment] += REGIME * self._segments(v_NL, segment_N)
        if self._by_category:
            read_NT[:, self._by_category] += REGIME * self._categories(v_NL, category_N)
        return read_NT


def _draw_side(rng: np.random.Generator, regimes: int, tasks: int) -> Reader:
    m_RLH = draw_m(rng, regimes, HIDDEN)
    common_RH1 = rng.normal(size=(regimes, HIDDEN, 1))
    return Reader(m_RLH, _unit(common_RH1 + rng.normal(size=(regimes, HIDDEN, tasks)), axis=1))


def _unit(vectors: F64, axis: int = 0) -> F64:
    """Each vector along the axis, scaled to length 1."""
    out: F64 = vectors / np.linalg.norm(vectors, axis=axis, keepdims=True)
    return out
