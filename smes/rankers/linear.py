"""The linear ranker: the floor for all others.

Its scores come from the linear part of the feature layer alone. Letters: B instances, I input width.
"""

from torch import nn

from smes.rankers.ranker import ExpertLimits, RankerOutput
from smes.rankers.ranker_input import RankerInput


class LinearRanker(nn.Module):
    """Has no representations, and so adds nothing to the linear part."""

    output_dim = 0
    expert_limits: ExpertLimits | None = None

    def forward(self, x_BI: RankerInput) -> RankerOutput:
        return RankerOutput(None)
