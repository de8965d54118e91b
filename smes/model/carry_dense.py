"""The dense weights across a change of the schema, tensor by tensor, and with them the optimiser's moments.

Each axis of a weight that depends on the schema has a map from its new places to the old ones. A weight of a new input
begins at 0, one of a new task as a new model has it, but for its output, which begins at 0: its score is its base rate.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from smes.model.carry_axes import Axes, DenseChange
from smes.schema_change import NEW

_BY_NAME = ("shared_rows_V", "boundaries_Q")
"""Weights that others carry over."""


def carried(old: Tensor, new: Tensor, axes: Axes, fill: float | None = None) -> Tensor:
    """A weight with the old values at their new places.

    Args:
        old: The weight before.
        new: The weight of a new model.
        axes: Of the new weight.
        fill: For all places that are new; None: 0 for inputs, else as in ``new``.

    Raises:
        ValueError: The shapes do not fit the axes.
    """
    out = torch.full_like(new, fill) if fill is not None else new.clone()
    values, index, at = out.numpy(), [], []
    for dim, axis in enumerate(axes):
        was = np.arange(new.shape[dim]) if axis is None else axis.was
        if len(was) != new.shape[dim] or was.max(initial=-1) >= old.shape[dim]:
            raise ValueError(f"shape {list(old.shape)} before and {list(new.shape)} now")
        known = np.flatnonzero(was != NEW)
        if fill is None and axis is not None and axis.inputs:
            values[(slice(None),) * dim + (was == NEW,)] = 0
        index.append(was[known])
        at.append(known)
    values[np.ix_(*at)] = old.numpy()[np.ix_(*index)]
    return out


def carried_weights(old: Mapping[str, Tensor], new: Mapping[str, Tensor], dense: DenseChange) -> dict[str, Tensor]:
    """All weights of a new model, with what it has of the old one.

    Raises:
        ValueError: A weight has another shape than the configuration says.
    """
    out = {}
    for name, tensor in new.items():
        old_name = dense.old_name(name)
        source = None if old_name is None else old.get(old_name)
        if source is None and name.startswith("ranker.newcomers.router.moments."):
            source = old[name.replace("newcomers.router", "router")]  # newcomers' routers read what the others read
        if source is None or name.startswith("structure.") or name in _BY_NAME:
            out[name] = tensor
            continue
        out[name] = _checked(name, source, tensor, dense.axes(name))
    if dense.model.ranker == "ple":
        out |= {name: _shared_as_before(t, dense) for name, t in out.items() if name.endswith(".allowed_GN")}
    for name in ("heads.out", "heads.out_bias"):
        if name in out:
            out[name][torch.from_numpy(dense.tasks.was == NEW)] = 0.0
    return out


def carried_moments(old: Mapping[str, Tensor], new: Mapping[str, Tensor], dense: DenseChange) -> dict[str, Tensor]:
    """AdamW's moments. A new place of a weight has the mean of the second moments of the others, so that it moves as
    they do.

    Args:
        old: The moments before, ``NAME.exp_avg`` and so on.
        new: The weights of the new model.
        dense: What changes.
    """
    out = {}
    for name, weight in new.items():
        old_name = dense.old_name(name)
        for kind in ("step", "exp_avg", "exp_avg_sq"):
            moment = None if old_name is None else old.get(f"{old_name}.{kind}")
            if moment is None:
                continue
            if kind == "step":
                out[f"{name}.{kind}"] = moment.clone()
                continue
            fill = float(moment.mean()) if kind == "exp_avg_sq" and moment.numel() else 0.0
            out[f"{name}.{kind}"] = _checked(name, moment, weight, dense.axes(name), fill)
    return out


def _checked(name: str, old: Tensor, new: Tensor, axes: Axes | None, fill: float | None = None) -> Tensor:
    if axes is None:
        axes = (None,) * new.dim()
    try:
        if old.dim() != new.dim() or len(axes) != new.dim() or old.dtype != new.dtype:
            raise ValueError(f"{old.dtype} {list(old.shape)} before and {new.dtype} {list(new.shape)} now")
        if any(axis is None and a != b for axis, a, b in zip(axes, old.shape, new.shape, strict=True)):
            raise ValueError(f"shape {list(old.shape)} before and {list(new.shape)} now")
        return carried(old, new, axes, fill) if new.dim() else old.clone()
    except ValueError as error:
        wanted = "expected the model configuration of before, but for the names of tasks"
        raise ValueError(f"weights {name}: {error}, {wanted}") from error


def _shared_as_before(allowed_GN: Tensor, dense: DenseChange) -> Tensor:
    """The shared stream does not read the experts of new tasks: what it gives would change."""
    new_N = torch.from_numpy(dense.levels_experts().was == NEW)
    out = allowed_GN.clone()
    out[-1, new_N] = False
    return out
