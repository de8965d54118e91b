"""The forms of an expert, by their name in the configuration.

Importing this does not import torch, as :mod:`smes.model_config` does not: the forms are imported when they are built.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smes.experts import Experts


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """What the experts of a ranker look like.

    Attributes:
        num_experts: E.
        input_dim: D, a multiple of 8.
        dims: Widths of an expert's layers.
        rank: Of ``low_rank`` experts.
        narrow_dim: Of ``residual`` experts.
        norm: Name in :data:`smes.experts.EXPERT_NORMS`.
    """

    num_experts: int
    input_dim: int
    dims: tuple[int, ...]
    rank: int
    narrow_dim: int
    norm: str


def _full(shape: ExpertShape) -> "Experts":
    from smes.experts import FullExperts

    return FullExperts(shape.num_experts, shape.input_dim, shape.dims, shape.norm)


def _low_rank(shape: ExpertShape) -> "Experts":
    from smes.experts import LowRankExperts

    return LowRankExperts(shape.num_experts, shape.input_dim, shape.dims[0], shape.rank, shape.norm)


def _residual(shape: ExpertShape) -> "Experts":
    from smes.experts import ResidualExperts

    return ResidualExperts(shape.num_experts, shape.input_dim, shape.dims[0], shape.narrow_dim, shape.norm)


EXPERT_FORMS: dict[str, Callable[[ExpertShape], "Experts"]] = {
    "full": _full,
    "low_rank": _low_rank,
    "residual": _residual,
}
"""Each builder returns a module."""
