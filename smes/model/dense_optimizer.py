"""The optimiser of the dense weights: AdamW, fused."""

from smes.model.config import OptimizerConfig
from smes.model.fused_adam import FusedAdam
from smes.model.rank_model import RankModel

_WITHOUT_DECAY = "features.wide_numerics"


class DenseOptimizer(FusedAdam):
    """AdamW for all dense weights of a model. Those of the linear part do not decay.

    Args:
        model: Whose weights.
        config: Their learning rate, decay and moments.
    """

    def __init__(self, model: RankModel, config: OptimizerConfig) -> None:
        learned = {n: p for n, p in model.named_parameters() if p.requires_grad}
        ordered = {n: learned[n] for n in sorted(learned, key=lambda n: n == _WITHOUT_DECAY)}  # the linear part last
        decay = {n: 0.0 if n == _WITHOUT_DECAY else config.weight_decay for n in ordered}
        super().__init__(ordered, config.learning_rate, config.betas, decay)
