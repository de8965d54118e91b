"""Which model: the ranker by its name, and its shape.

Importing this does not import torch, which takes longer than most commands that read a configuration run: a ranker's
module is imported when the ranker is built.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from smes.rankers.config import HomeConfig, MmoeConfig, PleConfig, SharedBottomConfig
from smes.rankers.sparse.config import SmesConfig

RANKER_NAMES = ("home", "linear", "mmoe", "ple", "shared_bottom", "smes")
"""The rankers that :mod:`smes.model.build` can build."""


@dataclass(frozen=True)
class ModelConfig:
    """Which model.

    Attributes:
        ranker: One of :data:`RANKER_NAMES`: ``smes``; ``home``, ``mmoe``, ``ple`` or ``shared_bottom``, its dense rivals;
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
        if self.ranker not in RANKER_NAMES:
            raise ValueError(f"model.ranker: {self.ranker!r}, expected one of {list(RANKER_NAMES)}")
        if self.embedding_dim < 1:
            raise ValueError(f"model.embedding_dim: {self.embedding_dim}, expected at least 1")
        if self.head_dim < 0:
            raise ValueError(f"model.head_dim: {self.head_dim}, expected at least 0")
        if not self.reads_embeddings and not self.wide:
            raise ValueError(f"model.wide: false, expected true for the {self.ranker} ranker, which has nothing else")

    @property
    def reads_embeddings(self) -> bool:
        """Whether the ranker reads embeddings; the linear one does not, and so has no embedding table."""
        return self.ranker != "linear"

    @property
    def table_dim(self) -> int:
        """Width of the embedding table: 0 for a ranker that reads no embeddings."""
        return self.embedding_dim if self.reads_embeddings else 0

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


# TODO(merge) was smes.optimizer_config: How the weights learn. Importing this does not import torch.


@dataclass(frozen=True)
class AdagradConfig:
    """Adagrad on touched rows (Duchi et al., 2011).

    Attributes:
        learning_rate: > 0.
        row_wise: One accumulator a row (the mean of the squared gradient over its columns, as in FBGEMM's
            ``EXACT_ROWWISE_ADAGRAD``) instead of one per weight.
        initial_accumulator: Start of the accumulators, ≥ 0. It is added to squared gradients of the *summed* loss, so
            that its meaning does not depend on the batch size.
    """

    learning_rate: float
    row_wise: bool
    initial_accumulator: float = 0.1

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate {self.learning_rate}, expected more than 0")
        if self.initial_accumulator < 0:
            raise ValueError(f"initial_accumulator {self.initial_accumulator}, expected at least 0")


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights learn.

    Attributes:
        learning_rate: Of the dense weights (AdamW, fused), > 0.
        weight_decay: Of the dense weights, decoupled, ≥ 0.
        betas: AdamW's decay rates.
        embedding_learning_rate: Of embedding rows (row-wise Adagrad), > 0.
        wide_learning_rate: Of the linear part's ids (Adagrad), > 0. Its numerics are dense weights as others: at an
            Adagrad rate they drown what the ranker learns (docs/quality.md).
        initial_accumulator: Start of Adagrad's accumulators; see :class:`AdagradConfig`.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    embedding_learning_rate: float = 0.005
    wide_learning_rate: float = 0.05
    initial_accumulator: float = 0.1

    def __post_init__(self) -> None:
        for name in ("learning_rate", "embedding_learning_rate", "wide_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optimizer.{name}: {getattr(self, name)}, expected more than 0")
        for name in ("weight_decay", "initial_accumulator"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name}: {getattr(self, name)}, expected at least 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas: {list(self.betas)}, expected two numbers from 0 to below 1")

    @property
    def embedding(self) -> AdagradConfig:
        """The rule for embedding rows."""
        return AdagradConfig(self.embedding_learning_rate, True, self.initial_accumulator)

    @property
    def wide(self) -> AdagradConfig:
        """The rule for the linear part's weights."""
        return AdagradConfig(self.wide_learning_rate, False, self.initial_accumulator)
