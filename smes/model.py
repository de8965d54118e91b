"""The model around a ranker: feature layer, linear part, ranker, task heads, base rates.

Letters: B instances, T tasks.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from smes.features import FeatureInputs, FeatureLayer
from smes.home_ranker import HoME, HomeConfig
from smes.linear_ranker import LinearRanker
from smes.losses import TaskHeads, TaskOutputs
from smes.mmoe_ranker import MMoE, MmoeConfig
from smes.ple_ranker import PLE, PleConfig
from smes.ranker import Ranker, RankerOutput, RoutedRanker
from smes.schema import Schema
from smes.shared_bottom_ranker import SharedBottom, SharedBottomConfig
from smes.smes_config import SmesConfig
from smes.smes_ranker import SMES
from smes.task_groups import task_groups


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
        build: (input width, schema, configuration) → a module that is a :class:`Ranker`.
        reads_embeddings: False spares the embedding table.
    """

    build: Callable[[int, Schema, ModelConfig], Ranker]
    reads_embeddings: bool = True


RANKERS: dict[str, RankerKind] = {
    "smes": RankerKind(
        lambda input_dim, schema, config: SMES(
            input_dim, schema.num_tasks, config.smes, task_groups("smes", schema, config.smes.groups)
        )
    ),
    "home": RankerKind(
        lambda input_dim, schema, config: HoME(input_dim, task_groups("home", schema, config.home.groups), config.home)
    ),
    "mmoe": RankerKind(lambda input_dim, schema, config: MMoE(input_dim, schema.num_tasks, config.mmoe)),
    "ple": RankerKind(lambda input_dim, schema, config: PLE(input_dim, schema.num_tasks, config.ple)),
    "shared_bottom": RankerKind(
        lambda input_dim, schema, config: SharedBottom(input_dim, schema.num_tasks, config.shared_bottom)
    ),
    "linear": RankerKind(lambda input_dim, schema, config: LinearRanker(), reads_embeddings=False),
}

_SHAPES: dict[str, type] = {
    "smes": SmesConfig,
    "shared_bottom": SharedBottomConfig,
    "mmoe": MmoeConfig,
    "ple": PleConfig,
    "home": HomeConfig,
}


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """Attributes: logits_BT, float32, base rates included; ranker, the ranker's own output; x_BI, what it read."""

    logits_BT: Tensor
    ranker: RankerOutput
    x_BI: Tensor


class RankModel(nn.Module):
    """Everything dense: all weights but the rows of the id table.

    Args:
        schema: Features and tasks.
        config: Which ranker, and its shape.
    """

    def __init__(self, schema: Schema, config: ModelConfig) -> None:
        super().__init__()
        self.features = FeatureLayer(schema, config.table_dim, wide=config.wide)
        self.ranker = RANKERS[config.ranker].build(self.features.output_dim, schema, config)
        width = self.ranker.output_dim
        self.heads = TaskHeads(schema.num_tasks, width, config.head_dim) if width else None
        self.tasks = TaskOutputs(schema)

    def forward(self, inputs: FeatureInputs, autocast: AbstractContextManager[object] | None = None) -> ModelOutput:
        """Logits of B ≥ 1 instances; ``autocast`` sets the precision of the ranker and the heads only."""
        x_BI, wide_BT = self.features(inputs)
        with autocast or nullcontext():
            output = self.ranker(x_BI)
            heads_BT = self.heads(output.tasks_BTH) if self.heads is not None else None
        logits = [part.float() for part in (wide_BT, heads_BT) if part is not None]
        return ModelOutput(sum(logits, start=self.tasks.base_logits()), output, x_BI)

    def choices(self, inputs: FeatureInputs, autocast: AbstractContextManager[object] | None = None) -> Tensor | None:
        """The experts that each task chooses for B ≥ 1 instances, int64 [B, T, K]; None for a ranker without."""
        if not isinstance(self.ranker, RoutedRanker):
            return None
        training = self.training
        self.eval()  # nothing observes: a look must not change what it looks at
        x_BI, _ = self.features(inputs)
        with autocast or nullcontext():
            choices_BTK = self.ranker.choices(x_BI)
        self.train(training)
        return choices_BTK


def build_model(schema: Schema, config: ModelConfig, seed: int) -> RankModel:
    """A model with first weights from ``seed`` alone; torch's global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RankModel(schema, config)


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
