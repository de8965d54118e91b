"""Whether a snapshot's model configuration fits its tensors, before the model is built.

A configuration of a few bytes can ask for layers of any width. So no more is allocated than the tensors account for,
and no loop runs longer.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from smes.model.config import RANKER_NAMES

_SPARE_VALUES = 1024 * 1024
_ALWAYS_ALLOWED = 4096  # a width or count that costs nothing
_FEW_LAYERS = 64
_NO_SIZES = ("found_until", "probe_until", "until", "max_active")  # numbers of instances, and a budget
_ALLOCATING = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)
_RANDOM = (Tensor.uniform_, Tensor.normal_, torch.nn.init.uniform_, torch.nn.init.kaiming_uniform_)


def fitting_config(data: object, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The model configuration in ``data``, without the rankers that it does not use.

    Args:
        data: :meth:`smes.model.config.ModelConfig.to_dict`, as it was read.
        tensors: The snapshot's.

    Raises:
        ValueError: A width or count is larger than any dimension of the tensors, or there are more layers than tensors.
    """
    if not isinstance(data, dict):
        raise ValueError(f"ModelConfig: {str(data)[:40]!r}, expected a mapping of keys to values")
    ranker = data.get("ranker", RANKER_NAMES[0])
    used = {key: value for key, value in data.items() if key not in RANKER_NAMES or key == ranker}
    largest = max((n for t in tensors.values() if t.numel() for n in t.shape), default=0)
    if ranker != "linear":
        _check_sizes("ModelConfig", used, max(_ALWAYS_ALLOWED, largest), max(_FEW_LAYERS, len(tensors)))
    return used


def _check_sizes(where: str, value: object, largest: int, most_layers: int) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in _NO_SIZES:
                layers = min(largest, most_layers) if key == "num_levels" else largest
                _check_sizes(f"{where}.{key}", inner, layers, most_layers)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) > most_layers:
            raise ValueError(f"{where}: {len(value)} entries, expected at most {most_layers} for these tensors")
        for i, inner in enumerate(value):
            _check_sizes(f"{where}[{i}]", inner, largest, most_layers)
    elif isinstance(value, int) and value > largest:
        raise ValueError(f"{where}: {value}, expected at most {largest}, the largest dimension of the tensors")


class OnlyAsLargeAs(TorchFunctionMode):
    """While it is entered, a module may allocate what these tensors hold, and is not filled with random numbers.

    Load a state into the module that gives every value.

    Args:
        tensors: What the module will hold.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._values = sum(t.numel() for t in tensors.values())
        self._left = self._values + _SPARE_VALUES

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Called by torch instead of each of its functions."""
        if func in _RANDOM:
            return args[0] if args else (kwargs or {})["tensor"]
        if func in _ALLOCATING:
            self._left -= _numel(args, kwargs or {})
            if self._left < 0:
                raise ValueError(f"the model configuration asks for more than the {self._values} values of the tensors")
        return func(*args, **(kwargs or {}))


def check_finite(name: str, tensor: Tensor) -> None:
    """Check that every value is a number.

    Raises:
        ValueError: With the tensor's name and how many are not.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return
    least, most = tensor.detach().aminmax()  # NaN if one is; one pass, without a copy
    if not (least.isfinite() and most.isfinite()):
        wrong = tensor.numel() - int(tensor.isfinite().sum())
        raise ValueError(f"tensor {name}: {wrong} values are NaN or infinite, expected numbers")


def check_types(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Check that tensors of the same name have the same type.

    Raises:
        ValueError: With the tensor's name.
    """
    for name, tensor in tensors.items():
        if name in expected and tensor.dtype != expected[name].dtype:
            raise ValueError(f"tensor {name}: {tensor.dtype}, expected {expected[name].dtype}")


def _numel(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    size = args or (kwargs.get("size", ()),)
    sizes = size[0] if isinstance(size[0], Sequence) else [n for n in size if isinstance(n, int)]
    return math.prod(int(n) for n in sizes)
