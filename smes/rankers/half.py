"""Half precision on the CPU: which products round what they multiply to bfloat16, and add up in float32.

Weights, their gradients and the optimisers stay float32. A ranker of few large products gains from torch's autocast.
SMES has many small ones, for which torch's bfloat16 kernels cost more than they save: there only the product that reads
the whole input is in half precision, and its gradients.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_HALF = ContextVar("half", default=False)


@contextmanager
def half_products() -> Iterator[None]:
    """Within it, products of a whole input with the first maps that read it are in half precision."""
    token = _HALF.set(True)
    try:
        yield
    finally:
        _HALF.reset(token)


def in_half() -> bool:
    """Whether a product of the whole input is to be in half precision now."""
    return _HALF.get()


def check_half() -> None:
    """Check that this CPU multiplies bfloat16: without, every product would cost several times as much.

    Raises:
        ValueError: It does not.
    """
    found = torch.cpu.get_capabilities()
    if not any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):
        raise ValueError("trainer.cpu_precision: 'bf16', expected fp32: this CPU has no instructions for bfloat16")
