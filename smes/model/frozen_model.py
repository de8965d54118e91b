"""Scores with a learner's weights as they were at one moment.

Letters: N instances, W id columns, F numeric features, T tasks.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from smes.arrays import F32, I64, Arrays
from smes.model.frozen import FrozenWeights, KeptState
from smes.model.learner import Learner
from smes.model.serving import ServingModel

_CPU = torch.device("cpu")


class FrozenModel:
    """A model whose weights stay as they were while the learner trains. Use it on the learner's thread.

    Args:
        learner: Whose weights.
        weights: Its :meth:`~smes.model.learner.Learner.freeze` or :meth:`~smes.model.learner.Learner.thaw`.
        device: Where to score.
    """

    def __init__(self, learner: Learner, weights: FrozenWeights, device: torch.device = _CPU) -> None:
        self._weights = weights
        self._model = ServingModel(learner.schema, learner.config, weights.dense, weights.rows, device=device)

    @classmethod
    def freeze(cls, learner: Learner, device: torch.device = _CPU) -> "FrozenModel":
        """The learner's weights as they are now."""
        return cls(learner, learner.freeze(), device)

    @classmethod
    def thaw(cls, learner: Learner, state: Arrays, device: torch.device = _CPU) -> "FrozenModel":
        """The model of a :meth:`state`, once the learner is in the state of the same moment.

        Raises:
            ValueError: The learner is in another state.
        """
        return cls(learner, learner.thaw(state), device)

    def score(self, ids: I64, numerics: F32, now_ms: I64 | int | None = None) -> F32:
        """As :meth:`smes.model.serving.ServingModel.score`."""
        # Instances of a stream: what they happen to share must not decide how their scores are rounded.
        return self._model.score(ids, numerics, now_ms, requests=np.arange(len(ids)))

    def later(self, ids: I64, numerics: F32, now_ms: I64 | int | None = None) -> Callable[[], F32]:
        """Look up the ids of N ≥ 1 instances now, on the learner's thread; the result scores them, on any thread.

        It must have been called when the model is closed.
        """
        read = self._model.derived(ids, numerics, now_ms)
        return partial(self._model.reading(self._weights.rows.found(read.ids)).score_derived, read)

    def state(self) -> Arrays:
        """The dense weights, and what changed in the table since. Nothing writes to these arrays any more."""
        return self._weights.state()

    def close(self) -> None:
        """Let the table forget what it kept for this model. May be called twice."""
        self._weights.close()


class KeptModel(FrozenModel):
    """A frozen model whose whole state was kept, so that the learner can go back to it. On the learner's thread.

    Args:
        learner: Whose state.
        kept: Its :meth:`~smes.model.learner.Learner.keep` or :meth:`~smes.model.learner.Learner.keep_again`.
        device: Where to score.
    """

    def __init__(self, learner: Learner, kept: KeptState, device: torch.device = _CPU) -> None:
        super().__init__(learner, kept.weights, device)
        self._learner, self._kept = learner, kept

    @classmethod
    def keep(cls, learner: Learner, device: torch.device = _CPU) -> "KeptModel":
        """The learner's state as it is now."""
        return cls(learner, learner.keep(), device)

    @classmethod
    def keep_again(cls, learner: Learner, state: Arrays, device: torch.device = _CPU) -> "KeptModel":
        """The model of a :meth:`state`, once the learner is in the state of the same moment.

        Raises:
            ValueError: The learner is in another state.
        """
        return cls(learner, learner.keep_again(state), device)

    def state(self) -> Arrays:
        """Everything but the table, and what changed in the table since. Nothing writes to these arrays any more."""
        return self._kept.state()

    def go_back(self) -> None:
        """Put the learner's weights, optimisers and ids back as they were; its step number stays.

        It reads the whole table into memory once more. Views of the table that are open stay those of before. This
        model is closed: the learner is in its state now.
        """
        step = self._learner.step_number
        self._learner.load_state(self._kept.tensors() | {"step_number": torch.tensor(step)})
        self.close()
