"""A plain SMES for tests that are about something else: two stages, linear routers per task, on the encoder."""

from typing import Any

from smes.rankers.sparse.config import SmesConfig

PLAIN: dict[str, Any] = {
    "num_experts": 16,
    "num_shared": 2,
    "num_group": 0,
    "num_adaptive": 1,
    "encoder_dims": (128,),
    "expert_dims": (64,),
    "experts": "full",
    "group_pools": "common",
    "routers": "task",
    "router_maps": "shared",
    "router_rank": None,
    "router_input": "encoder",
    "router_norm": "none",
}
"""Every key whose default is another, so that a test varies one thing from something simple."""


def plain(**keys: Any) -> SmesConfig:
    """The plain form with ``keys`` over it."""
    return SmesConfig(**{**PLAIN, **keys})
