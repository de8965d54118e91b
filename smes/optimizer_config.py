"""How the weights learn. Importing this does not import torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AdagradConfig:
    """Adagrad on touched rows (Duchi et al., 2011).

    Attributes:
        learning_rate: > 0.
        row_wise: One accumulator a row (the mean of the squared gradient over its columns, as in FBGEMM's
            ``EXACT_ROWWISE_ADAGRAD``) instead of one per weight.
        initial_accumulator: Start of the accumulators, ≥ 0. It is added to squared gradients of the *summed* loss, so
            that its meaning does not depend on the batch size.
    """

    learning_rate: float
    row_wise: bool
    initial_accumulator: float = 0.1

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate {self.learning_rate}, expected more than 0")
        if self.initial_accumulator < 0:
            raise ValueError(f"initial_accumulator {self.initial_accumulator}, expected at least 0")


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights learn.

    Attributes:
        learning_rate: Of the dense weights (AdamW, fused), > 0.
        weight_decay: Of the dense weights, decoupled, ≥ 0.
        betas: AdamW's decay rates.
        embedding_learning_rate: Of embedding rows (row-wise Adagrad), > 0.
        wide_learning_rate: Of the linear part's ids (Adagrad), > 0. Its numerics are dense weights as others: at an
            Adagrad rate they drown what the ranker learns (docs/quality.md).
        initial_accumulator: Start of Adagrad's accumulators; see :class:`AdagradConfig`.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    embedding_learning_rate: float = 0.005
    wide_learning_rate: float = 0.05
    initial_accumulator: float = 0.1

    def __post_init__(self) -> None:
        for name in ("learning_rate", "embedding_learning_rate", "wide_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optimizer.{name}: {getattr(self, name)}, expected more than 0")
        for name in ("weight_decay", "initial_accumulator"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name}: {getattr(self, name)}, expected at least 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas: {list(self.betas)}, expected two numbers from 0 to below 1")

    @property
    def embedding(self) -> AdagradConfig:
        """The rule for embedding rows."""
        return AdagradConfig(self.embedding_learning_rate, True, self.initial_accumulator)

    @property
    def wide(self) -> AdagradConfig:
        """The rule for the linear part's weights."""
        return AdagradConfig(self.wide_learning_rate, False, self.initial_accumulator)
