"""Examples that one frozen copy of the weights will score: many at once cost less than a batch each.

The weights do not change, so it does not matter when they score. Where a group of examples ends depends on the examples
alone, so that a restart gives the same bits: the ones that wait are part of the state.

Letters: N examples, T tasks.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np

from smes.arrays import F32, Arrays, Bool, prefixed, under
from smes.events import ExampleBlock
from smes.schema import Schema

WAITING = "waiting."
"""Prefix of the state's arrays."""
SCORES = f"{WAITING}scores"
"""float32 [N, T]: what the frozen copy gives them now, for who cannot go on with it (:mod:`trainer.carry_over`)."""
WHOLE_FROM_THE_START = f"{WAITING}whole"
"""bool [N], as in :meth:`WaitingExamples.add`."""
_MOST_BEING_SCORED = 2  # groups of examples, on another thread: a bound of memory


class WaitingExamples:
    """The first examples of impressions, in their order, until they are scored.

    Args:
        schema: Features and tasks.
    """

    def __init__(self, schema: Schema) -> None:
        self._empty = ExampleBlock.empty(schema)
        self._parts: list[ExampleBlock] = []
        self._whole: list[Bool] = []

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def add(self, examples: ExampleBlock, *, whole: bool) -> None:
        """Let examples wait.

        Args:
            examples: At most one of each impression.
            whole: Whether their labels are final.
        """
        self._parts.append(examples)
        self._whole.append(np.full(len(examples), whole))

    def all(self) -> tuple[ExampleBlock, Bool]:
        """Those that wait, and which of them have final labels."""
        if not self._parts:
            return self._empty, np.zeros(0, np.bool_)
        self._parts, self._whole = [ExampleBlock.concat(self._parts)], [np.concatenate(self._whole)]
        return self._parts[0], self._whole[0]

    def have_one_of(self, closings: ExampleBlock) -> bool:
        """Whether an example of one of these impressions waits whose labels are not final."""
        if all(whole.all() for whole in self._whole):
            return False
        examples, whole_N = self.all()
        return bool(np.isin(closings.impression_id, examples.impression_id[~whole_N]).any())

    def clear(self) -> None:
        """Nothing waits any more."""
        self._parts, self._whole = [], []

    def state(self) -> Arrays:
        """Arrays from which :meth:`load_state` goes on."""
        examples, whole_N = self.all()
        return prefixed(WAITING, examples.arrays()) | {WHOLE_FROM_THE_START: whole_N}

    def load_state(self, state: Arrays) -> None:
        """The inverse of :meth:`state`; nothing waits in a state of before examples waited."""
        self.clear()
        examples, whole_N = self.of(state)
        if examples is not None:
            self._parts, self._whole = [examples], [whole_N]

    @staticmethod
    def of(state: Arrays) -> tuple[ExampleBlock | None, Bool]:
        """As :meth:`all`, of a state; None where nothing waits."""
        whole_N: Bool = state.get(WHOLE_FROM_THE_START, np.zeros(0, np.bool_))
        if not len(whole_N):
            return None, whole_N
        columns = {name: a for name, a in under(WAITING, state).items() if name in ExampleBlock.__dataclass_fields__}
        return ExampleBlock(**columns), whole_N


class BeingScored:
    """Groups of examples whose scores another thread computes, in their order.

    Args:
        place: Takes the scores of a group, its examples, and which of them have final labels.
    """

    def __init__(self, place: Callable[[F32, ExampleBlock, Bool], None]) -> None:
        self._place = place
        self._groups: deque[tuple[Future[F32], ExampleBlock, Bool]] = deque()

    def add(self, start: Callable[[], Future[F32]], examples: ExampleBlock, whole_N: Bool) -> None:
        """Begin with a group, as soon as few enough are being scored."""
        self.finish(left=_MOST_BEING_SCORED - 1)
        self._groups.append((start(), examples, whole_N))

    def finish(self, left: int = 0) -> None:
        """Wait until so many groups at most are being scored, and place the scores of the others."""
        while len(self._groups) > left:
            scores, examples, whole_N = self._groups.popleft()
            self._place(scores.result(), examples, whole_N)

    def have_open_ones(self) -> bool:
        """Whether labels of some of the examples are not final."""
        return not all(whole_N.all() for _, _, whole_N in self._groups)
