"""Configuration of the model and of its optimiser.

Importing this does not import torch, which takes longer than most commands that only read a configuration.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal, get_args, get_type_hints

from annotated_types import Ge, Le, Lt

from smes.ranges import EventSeconds, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, check_ranges
from smes.rankers.config import HomeConfig, MmoeConfig, PleConfig, SharedBottomConfig
from smes.rankers.sparse.config import SmesConfig, smes_default, smes_large, smes_paper

RankerName = Literal["smes", "home", "mmoe", "ple", "shared_bottom", "linear"]
RANKER_NAMES: tuple[RankerName, ...] = get_args(RankerName)
"""The rankers; their builders are in :data:`smes.model.rank_model.RANKERS`."""

Preset = Literal["default", "paper", "large"]


@dataclass(frozen=True)
class RareTasksConfig:
    """How binary tasks with few positives learn beside dense ones (docs/experiments/rare-tasks.md).

    Attributes:
        gradient_power: α. The gradient that a task of base rate p sends into its representation is multiplied by
            ``(0.25 / (p (1 - p)))^α``, so that what tasks share learns from rare tasks, too. With 0.5 the gradients of
            all tasks vary alike: ``p (1 - p)`` is the variance of a logit's gradient. 0: by 1 for every task. The
            task's own head learns from the plain gradient.
        gradient_limit: The largest such factor.
        linear_prior: c. The linear part's logit of a task is multiplied by ``(n + 1) / (n + 1 + c)``, with n the labels
            of its rarer kind so far: what few positives tell about single ids is mostly noise. 0: by 1 for every task.
        borrow_ratio: The base rate of a task follows the predictions of those tasks that have at least this many times
            as many positives, > 1 (:mod:`smes.model.borrowing`). 0: no task borrows.
    """

    gradient_power: NonNegativeFloat = 0.5
    gradient_limit: Annotated[float, Ge(1)] = 30.0
    linear_prior: NonNegativeFloat = 30.0
    borrow_ratio: NonNegativeFloat = 3.0

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.borrow_ratio and self.borrow_ratio <= 1:
            raise ValueError(f"RareTasksConfig.borrow_ratio: {self.borrow_ratio}, expected 0, or more than 1")


@dataclass(frozen=True)
class ModelConfig:
    """The model: which ranker, its shape, and the layers around it.

    Attributes:
        ranker: ``smes``; its dense rivals ``home``, ``mmoe``, ``ple`` and ``shared_bottom``; or ``linear``, the floor.
        embedding_dim: Width of an embedding row; features may use less of it (:attr:`smes.schema.Feature.dim`).
        wide: Whether a linear part (a weight per id and task) is added to the logits. The linear ranker needs it.
        head_dim: Hidden width of the task heads; 0 for linear heads.
        embedding_scale: The first weights of an embedding are uniform in ± this.
        rare: How tasks with few positives learn.
        smes: Shape of the ``smes`` ranker.
        shared_bottom, mmoe, ple, home: Shapes of its rivals.
    """

    ranker: RankerName = "smes"
    embedding_dim: PositiveInt = 16
    wide: bool = True
    head_dim: NonNegativeInt = 0
    embedding_scale: float = 0.01
    rare: RareTasksConfig = field(default_factory=RareTasksConfig)
    smes: SmesConfig = field(default_factory=SmesConfig)
    shared_bottom: SharedBottomConfig = field(default_factory=SharedBottomConfig)
    mmoe: MmoeConfig = field(default_factory=MmoeConfig)
    ple: PleConfig = field(default_factory=PleConfig)
    home: HomeConfig = field(default_factory=HomeConfig)

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.reads_embeddings and not self.wide:
            wanted = f"expected true for the {self.ranker} ranker, which has no other part"
            raise ValueError(f"ModelConfig.wide: false, {wanted}")

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
        return {key: _plain(value) for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ModelConfig":
        """The inverse of :meth:`to_dict`; keys that are left out have their defaults.

        Raises:
            ValueError: An unknown key, named by its dotted path, or a value out of range.
        """
        config: ModelConfig = _structured(cls, data, cls.__name__)
        return config


def model_preset(name: Preset) -> ModelConfig:
    """A complete model configuration by its name.

    Args:
        name: ``default``; ``paper``, SMES as the paper describes it; ``large``, SMES with 256 experts for long streams.

    Raises:
        ValueError: There is no such preset.
    """
    if name not in _PRESETS:
        raise ValueError(f"model.preset: {name!r}, expected one of {', '.join(_PRESETS)}")
    return ModelConfig(smes=_PRESETS[name]())


_PRESETS: dict[Preset, Callable[[], SmesConfig]] = {
    "default": smes_default,
    "paper": smes_paper,
    "large": smes_large,
}


def _structured(hint: Any, data: Any, where: str) -> Any:
    """An instance of the dataclass ``hint`` from plain data; other values with tuples for lists."""
    if not is_dataclass(hint):
        return _with_tuples(data)
    if not isinstance(data, dict):
        raise ValueError(f"{where}: {data!r}, expected a mapping of keys to values")
    hints = get_type_hints(hint)
    names = [f.name for f in fields(hint)]
    for key in data:
        if key not in names:
            raise ValueError(f"{where}.{key}: unknown key, expected one of {', '.join(names)}")
    build: Any = hint
    return build(**{key: _structured(hints[key], value, f"{where}.{key}") for key, value in data.items()})


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tuples(element) for key, element in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(element) for key, element in value.items()}
    return [_plain(element) for element in value] if isinstance(value, tuple) else value


@dataclass(frozen=True)
class AdagradConfig:
    """Adagrad on touched rows (Duchi et al., 2011).

    Attributes:
        learning_rate: Step size.
        row_wise: One accumulator per row (the mean of the squared gradient over its columns, as in FBGEMM's
            ``EXACT_ROWWISE_ADAGRAD``) instead of one per weight.
        initial_accumulator: Start of the accumulators. They sum squared gradients of the *summed* loss, so that their
            meaning does not depend on the batch size.
    """

    learning_rate: PositiveFloat
    row_wise: bool
    initial_accumulator: NonNegativeFloat = 0.1

    def __post_init__(self) -> None:
        check_ranges(self)


_Decay = Annotated[float, Ge(0), Lt(1)]


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights learn.

    Attributes:
        learning_rate: Of the dense weights (AdamW, fused).
        weight_decay: Of the dense weights, decoupled.
        betas: AdamW's decay rates.
        embedding_learning_rate: Of the embedding rows (row-wise Adagrad).
        wide_learning_rate: Of the linear part's ids (Adagrad). The linear part's weights of numeric features are dense
            weights like others: at an Adagrad rate they drown what the ranker learns (docs/experiments/quality.md).
        initial_accumulator: Start of Adagrad's accumulators; see :class:`AdagradConfig`.
        accumulator_half_life_s: Adagrad's accumulators forget: what a row's accumulators have above their start halves
            in so many seconds of event time, so that rows keep learning where the stream drifts. Null: they never
            forget.
        frequency_power: q. The learning rate of a row falls with its frequency, in addition to what Adagrad does: it is
            multiplied by ``n^-q`` in the n-th batch that reads the row. Adagrad alone goes about as ``n^-0.5``. Less
            than 0 keeps frequent ids moving, more than 0 settles them sooner.
    """

    learning_rate: PositiveFloat = 2e-3
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[_Decay, _Decay] = (0.9, 0.999)
    embedding_learning_rate: PositiveFloat = 0.01
    wide_learning_rate: PositiveFloat = 0.03
    initial_accumulator: NonNegativeFloat = 0.1
    accumulator_half_life_s: EventSeconds | None = None
    frequency_power: Annotated[float, Ge(-0.5), Le(0.5)] = 0.0

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def embedding(self) -> AdagradConfig:
        """The rule for embedding rows."""
        return AdagradConfig(self.embedding_learning_rate, True, self.initial_accumulator)

    @property
    def wide(self) -> AdagradConfig:
        """The rule for the linear part's weights."""
        return AdagradConfig(self.wide_learning_rate, False, self.initial_accumulator)
