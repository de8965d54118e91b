"""Adam and AdamW, fused, without the rest of torch's optimisers.

``torch.optim.Optimizer`` imports ``torch._dynamo`` when the first one is made: over a second of processor time for a
compiler that nothing here uses. The arithmetic is torch's own, through its functional form; what is left out is hooks,
parameter groups and state by object.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.optim.adam import adam

from smes.arrays import prefixed, under
from smes.model.gradient_kernels import sum_of_squares
from smes.rankers.kernels import on_host

_EPSILON = 1e-8


class FusedAdam:
    """Adam for some weights of one floating point type, all on one device.

    A weight's moments begin with its first gradient. A weight without a gradient is left out of a step.

    Args:
        weights: Name → weight. The state has them by these names.
        learning_rate: Its step size.
        betas: Decay of the first and of the second moment.
        decay: Name → decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101); 0 where there is none.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        decay: Mapping[str, float] | None = None,
    ) -> None:
        self._weights, self._rate, self._betas = dict(weights), learning_rate, betas
        of_each = {name: 0.0 if decay is None else decay.get(name, 0.0) for name in weights}
        self._alike = [(d, [n for n in weights if of_each[n] == d]) for d in dict.fromkeys(of_each.values())]
        self._moments: dict[str, dict[str, Tensor]] = {}

    def gradients(self) -> list[Tensor]:
        """Of the weights that have one, after ``backward``."""
        return [weight.grad for weight in self._weights.values() if weight.grad is not None]

    def square(self) -> Tensor:
        """The sum of the squares of all gradients, which the step adds up: not finite if one of them is not. Scalar."""
        gradients = self.gradients()
        if all(on_host(g) and g.dtype == torch.float32 for g in gradients):
            gradients = [gradient.contiguous() for gradient in gradients]
            addresses = np.array([gradient.data_ptr() for gradient in gradients], np.int64)
            sizes = np.array([gradient.numel() for gradient in gradients], np.int64)
            return torch.tensor(sum_of_squares(addresses, sizes), dtype=torch.float32)
        flat = [gradient.reshape(-1) for gradient in gradients]
        return torch.stack([torch.dot(one, one) for one in flat]).sum()  # a fifth of the time of a norm

    def flat(self, *more: Tensor) -> Tensor:
        """All gradients in one vector, to be summed over ranks; zeros for a weight without one.

        Which weights have one depends on the model alone, not on the batch: it is the same on every rank.

        Args:
            more: Further tensors, which come last.
        """
        weights = self._weights.values()
        gradients = [torch.zeros_like(w).view(-1) if w.grad is None else w.grad.reshape(-1) for w in weights]
        return torch.cat([*gradients, *(tensor.reshape(-1) for tensor in more)])

    def put_flat(self, flat: Tensor, *more: Tensor) -> None:
        """Take gradients from a vector as :meth:`flat` makes it, whose memory they share. What comes last is copied."""
        weights = list(self._weights.values())
        parts = torch.split(flat, [tensor.numel() for tensor in (*weights, *more)])
        for weight, part in zip(weights, parts[: len(weights)], strict=True):
            if weight.grad is not None:
                weight.grad = part.view(weight.shape)
        for tensor, part in zip(more, parts[len(weights) :], strict=True):
            tensor.copy_(part.view(tensor.shape))

    def clear(self) -> None:
        """Forget the gradients."""
        for weight in self._weights.values():
            weight.grad = None

    @torch.no_grad()
    def step(self, taken: Tensor | None = None) -> None:
        """Take a step.

        Args:
            taken: bool scalar. If it is false, nothing changes. None: it is true.
        """
        # As torch.amp.GradScaler tells a fused optimiser that its step is not to be taken.
        found_inf = None if taken is None else (~taken).float()
        for decay, names in self._alike:
            moving = [(name, grad) for name in names if (grad := self._weights[name].grad) is not None]
            if not moving:
                continue
            moments = [self._moments_of(name) for name, _ in moving]
            adam(
                [self._weights[name] for name, _ in moving],
                [grad for _, grad in moving],
                [of["exp_avg"] for of in moments],
                [of["exp_avg_sq"] for of in moments],
                [],
                [of["step"] for of in moments],
                fused=True,
                found_inf=found_inf,
                amsgrad=False,
                beta1=self._betas[0],
                beta2=self._betas[1],
                lr=self._rate,
                weight_decay=decay,
                eps=_EPSILON,
                maximize=False,
                decoupled_weight_decay=True,
            )

    @property
    def moments(self) -> list[Tensor]:
        """All tensors that it keeps of the weights. Not copies."""
        return [tensor for moments in self._moments.values() for tensor in moments.values()]

    def state(self) -> dict[str, Tensor]:
        """The moments by weight, ``NAME.exp_avg`` and so on. Not copies."""
        state: dict[str, Tensor] = {}
        for name, moments in self._moments.items():
            state |= prefixed(f"{name}.", moments)
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state`. Weights that are not in it begin anew."""
        self._moments = {}
        for name, weight in self._weights.items():
            if f"{name}.step" in state:
                moments = under(f"{name}.", state)
                self._moments[name] = {
                    kind: tensor.to(weight.device, torch.float32 if kind == "step" else weight.dtype)
                    for kind, tensor in moments.items()
                }

    def _moments_of(self, name: str) -> dict[str, Tensor]:
        if name not in self._moments:
            weight = self._weights[name]
            self._moments[name] = {
                "step": torch.zeros((), dtype=torch.float32, device=weight.device),
                "exp_avg": torch.zeros_like(weight, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(weight, memory_format=torch.preserve_format),
            }
        return self._moments[name]
