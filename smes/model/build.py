"""Builds the ranker that a configuration names. The names are in :mod:`smes.model.config`, which needs no torch."""

from collections.abc import Callable

from smes.model.config import ModelConfig, RankerName
from smes.rankers.config import task_groups
from smes.rankers.home import HoME
from smes.rankers.linear import LinearRanker
from smes.rankers.mmoe import MMoE
from smes.rankers.ple import PLE
from smes.rankers.ranker import Ranker
from smes.rankers.shared_bottom import SharedBottom
from smes.rankers.sparse.ranker import SMES
from smes.schema import Schema

RANKERS: dict[RankerName, Callable[[int, Schema, ModelConfig], Ranker]] = {
    "home": lambda i, s, c: HoME(i, task_groups("HomeConfig.groups", s, c.home.groups), c.home),
    "linear": lambda i, s, c: LinearRanker(),
    "mmoe": lambda i, s, c: MMoE(i, s.num_tasks, c.mmoe),
    "ple": lambda i, s, c: PLE(i, s.num_tasks, c.ple),
    "shared_bottom": lambda i, s, c: SharedBottom(i, s.num_tasks, c.shared_bottom),
    "smes": lambda i, s, c: SMES(
        i, s.num_tasks, c.smes, task_groups("GroupsConfig.declared", s, c.smes.groups.declared)
    ),
}
"""Ranker name → (input width, schema, configuration) → a module that is a :class:`smes.rankers.ranker.Ranker`."""
