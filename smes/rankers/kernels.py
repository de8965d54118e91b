"""Where compiled loops may run."""

from torch import Tensor


def on_host(x: Tensor) -> bool:
    """Whether compiled loops may read it: on the CPU, with values (none while a model is traced)."""
    return type(x) is Tensor and x.device.type == "cpu"
