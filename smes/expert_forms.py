"""The forms of an expert, by their name in the configuration."""

from collections.abc import Callable
from dataclasses import dataclass

from smes.experts import Experts, FullExperts, LowRankExperts, ResidualExperts


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


EXPERT_FORMS: dict[str, Callable[[ExpertShape], Experts]] = {
    "full": lambda s: FullExperts(s.num_experts, s.input_dim, s.dims, s.norm),
    "low_rank": lambda s: LowRankExperts(s.num_experts, s.input_dim, s.dims[0], s.rank, s.norm),
    "residual": lambda s: ResidualExperts(s.num_experts, s.input_dim, s.dims[0], s.narrow_dim, s.norm),
}
"""Each builder returns a module."""
