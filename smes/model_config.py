"""Which model: the ranker by its name, and its shape.

Importing this does not import torch, which takes longer than most commands that read a configuration run: a ranker's
module is imported when the ranker is built.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from smes.dense_config import HomeConfig, MmoeConfig, PleConfig, SharedBottomConfig
from smes.schema import Schema
from smes.smes_config import SmesConfig
from smes.task_groups import task_groups

if TYPE_CHECKING:
    from smes.ranker import Ranker


@dataclass(frozen=True)
class ModelConfig:
    """Which model.

    Attributes:
        ranker: Name in :data:`RANKERS`: ``smes``; ``home``, ``mmoe``, ``ple`` or ``shared_bottom``, its dense rivals;
            ``linear``, the floor.
        embedding_dim: Width of an embedding row, ≥ 1; features may use less of it (:attr:`Feature.dim`).
        wide: Whether a linear part (a weight per id and task) is added to the logits. The linear ranker needs it.
        head_dim: Hidden width of the task heads; 0 for linear heads.
        embedding_scale: First weights of an embedding are uniform in ± this.
        smes: Shape of the ``smes`` ranker.
        shared_bottom, mmoe, ple, home: Shapes of its rivals.
    """

    ranker: str = "smes"
    embedding_dim: int = 16
    wide: bool = True
    head_dim: int = 0
    embedding_scale: float = 0.01
    smes: SmesConfig = field(default_factory=SmesConfig)
    shared_bottom: SharedBottomConfig = field(default_factory=SharedBottomConfig)
    mmoe: MmoeConfig = field(default_factory=MmoeConfig)
    ple: PleConfig = field(default_factory=PleConfig)
    home: HomeConfig = field(default_factory=HomeConfig)

    def __post_init__(self) -> None:
        if self.ranker not in RANKERS:
            raise ValueError(f"model.ranker: {self.ranker!r}, expected one of {sorted(RANKERS)}")
        if self.embedding_dim < 1:
            raise ValueError(f"model.embedding_dim: {self.embedding_dim}, expected at least 1")
        if self.head_dim < 0:
            raise ValueError(f"model.head_dim: {self.head_dim}, expected at least 0")
        if not RANKERS[self.ranker].reads_embeddings and not self.wide:
            raise ValueError(f"model.wide: false, expected true for the {self.ranker} ranker, which has nothing else")

    @property
    def table_dim(self) -> int:
        """Width of the embedding table: 0 for a ranker that reads no embeddings."""
        return self.embedding_dim if RANKERS[self.ranker].reads_embeddings else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data (JSON) from which :meth:`from_dict` builds an equal configuration."""
        data = asdict(self)
        return {k: _plain(v) for k, v in data.items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ModelConfig":
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: An unknown key, or a value out of range.
        """
        shapes = {name: shape(**_known(shape, data.get(name, {}))) for name, shape in _SHAPES.items()}
        return cls(**{**_known(cls, data), **shapes})


@dataclass(frozen=True)
class RankerKind:
    """How a ranker is built, by its name in the configuration.

    Attributes:
        build: (input width, schema, configuration) → a module that is a :class:`smes.ranker.Ranker`.
        reads_embeddings: False spares the embedding table.
    """

    build: Callable[[int, Schema, ModelConfig], "Ranker"]
    reads_embeddings: bool = True


def _smes(input_dim: int, schema: Schema, config: ModelConfig) -> "Ranker":
    from smes.smes_ranker import SMES

    return SMES(input_dim, schema.num_tasks, config.smes, task_groups("smes", schema, config.smes.groups))


def _home(input_dim: int, schema: Schema, config: ModelConfig) -> "Ranker":
    from smes.home_ranker import HoME

    return HoME(input_dim, task_groups("home", schema, config.home.groups), config.home)


def _mmoe(input_dim: int, schema: Schema, config: ModelConfig) -> "Ranker":
    from smes.mmoe_ranker import MMoE

    return MMoE(input_dim, schema.num_tasks, config.mmoe)


def _ple(input_dim: int, schema: Schema, config: ModelConfig) -> "Ranker":
    from smes.ple_ranker import PLE

    return PLE(input_dim, schema.num_tasks, config.ple)


def _shared_bottom(input_dim: int, schema: Schema, config: ModelConfig) -> "Ranker":
    from smes.shared_bottom_ranker import SharedBottom

    return SharedBottom(input_dim, schema.num_tasks, config.shared_bottom)


def _linear(input_dim: int, schema: Schema, config: ModelConfig) -> "Ranker":
    from smes.linear_ranker import LinearRanker

    return LinearRanker()


RANKERS: dict[str, RankerKind] = {
    "smes": RankerKind(_smes),
    "home": RankerKind(_home),
    "mmoe": RankerKind(_mmoe),
    "ple": RankerKind(_ple),
    "shared_bottom": RankerKind(_shared_bottom),
    "linear": RankerKind(_linear, reads_embeddings=False),
}

_SHAPES: dict[str, type] = {
    "smes": SmesConfig,
    "shared_bottom": SharedBottomConfig,
    "mmoe": MmoeConfig,
    "ple": PleConfig,
    "home": HomeConfig,
}


def _known(cls: type, data: dict[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(cls)}
    for key in data:
        if key not in names:
            raise ValueError(f"{cls.__name__}: unknown key {key!r}, expected one of {sorted(names)}")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value
