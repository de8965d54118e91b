"""Weights that make up for negatives that were trained on before their positives came.

An impression is trained on when its task's wait is over, with y = 1 if the positive has come by then, else with y = 0.
A positive that comes later is trained on, too, as y = 1: a *correction*. Let p be the probability of a positive and s
the share of the positives that come after the wait (``late_share``). Of one impression come, in the mean,

    p(1 − s) + ps = p   examples with y = 1        1 − p(1 − s)   examples with y = 0

1 + ps in all, and too many of them negative: 1 − p of the negatives are real ones. Importance weights turn the mean
over these examples into the mean over impressions with their final labels: the true share of a label, divided by its
share among the examples,

    y = 1:   p / (p / (1 + ps))                        = 1 + ps
    y = 0:   (1 − p) / ((1 − p(1 − s)) / (1 + ps))     = (1 + ps)(1 − p) / (1 − p(1 − s))

p is what the model predicts, and no gradient goes through it. For the gradient of the cross-entropy by the logit of an
impression whose probability is r, while the model says p, this gives in the mean

    r·(1 + ps)·(p − 1) + (1 − r(1 − s))·(1 + ps)(1 − p)/(1 − p(1 − s))·p
        = (1 + ps)(1 − p)/(1 − p(1 − s)) · (p − r)

It is 0 where p = r, and nowhere else points the wrong way: the final labels' gradient p − r, times a positive factor.

- *Fake negative weighted* (FNW; Ktena et al. 2019, arXiv 1907.06558, section 3): nothing is known at once, so s = 1:
  weights 1 + p and (1 + p)(1 − p). Positives known by the end of the wait come as corrections, too.
- *Elapsed-time sampled* (ES-DFM; Yang et al., AAAI 2021, arXiv 2012.03245, section 4): wait a while first. The paper
  learns the probability of a late positive, ps, and of a real negative, (1 − p)/(1 − p(1 − s)), with two models of
  their own. Here both follow from p and from one s a task, which the join counts. So s is that of the mean positive: if
  delays depend on the impression, the weights are right in the mean only.
- With s = 0 the weights are 1: naive negatives if positives do come later, and right if they cannot.

The factor 1 + ps is the number of examples that an impression has. It keeps the shares of the labels right within an
impression, but an impression with a high p counts for more than another. The mean label of all impressions must not do
that, so it is counted without the factor: 1 for a positive, (1 − p)/(1 − p(1 − s)) for a negative.

Letters: B instances, T tasks.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DelayedWeights:
    """Weights of the labels of a batch, beside its sample weights.

    Attributes:
        loss_BT: float32, for the loss: the equations above.
        mean_BT: float32, for the mean label: the same without the factor 1 + ps.
    """

    loss_BT: Tensor
    mean_BT: Tensor

    @classmethod
    def of(cls, logits_BT: Tensor, labels_BT: Tensor, late_share_BT: Tensor) -> Self:
        """The weights by the model's predictions.

        Args:
            logits_BT: The predictions of binary tasks as logits; no gradient goes through them.
            labels_BT: Above 0 for a positive.
            late_share_BT: s, 0 … 1; 0 for regression tasks, and wherever there is no label.
        """
        p_BT, s_BT = logits_BT.detach().float().sigmoid(), late_share_BT
        negative_BT = (1 - p_BT) / (1 - p_BT * (1 - s_BT)).clamp(min=torch.finfo(p_BT.dtype).tiny)
        # s = 0 is exactly 1, also where p has become 1.
        mean_BT = torch.where((labels_BT > 0) | (s_BT == 0), 1.0, negative_BT)
        return cls(loss_BT=(1 + p_BT * s_BT) * mean_BT, mean_BT=mean_BT)
