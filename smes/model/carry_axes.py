"""Which axes of the dense weights depend on the schema, and where their entries were before a change.

A table of rules names the axes of each weight of each ranker. :mod:`smes.model.carry_dense` carries the weights over.

Letters: I columns that the ranker reads, D width of the encoder's output (I without an encoder), F numeric features, N
columns made from them, T tasks.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from smes.arrays import I64
from smes.model.config import ModelConfig
from smes.model.features import input_columns, numeric_columns
from smes.rankers.structure import Structure
from smes.schema import Schema
from smes.schema_change import NEW, SchemaChange


@dataclass(frozen=True, eq=False)
class Axis:
    """Where the entries of one axis were: int64, -1 where they are new; and whether new ones are inputs."""

    was: I64
    inputs: bool = False

    def repeated(self, width: int) -> "Axis":
        """An axis of ``width`` places for each of this one's."""
        places = self.was[:, None] * width + np.arange(width)
        return Axis(np.where(self.was[:, None] == NEW, NEW, places).reshape(-1), self.inputs)

    def then(self, other: "Axis", old_length: int) -> "Axis":
        """This axis, of ``old_length`` places before, with another one behind it."""
        behind = np.where(other.was == NEW, NEW, other.was + old_length)
        return Axis(np.concatenate([self.was, behind]), self.inputs or other.inputs)


Axes = tuple[Axis | None, ...]
"""Per dimension; None where nothing changes."""


def same(length: int) -> Axis:
    """An axis in which nothing changes."""
    return Axis(np.arange(length))


@dataclass(frozen=True)
class DenseChange:
    """How the dense weights of a model change with the schema.

    Attributes:
        change: Of the model's inputs.
        model: The configuration, of which only what names tasks may have changed.
        was, now: The rankers' structures.
    """

    change: SchemaChange
    model: ModelConfig
    was: Structure
    now: Structure

    def old_name(self, name: str) -> str | None:
        """The name that a weight had; None for one of a part that is new."""
        for pattern, places in (
            (r"features\.attention\.(\d+)\.", self._attention),
            (r"ranker\.newcomers\.own\.(\d+)\.", self._newcomers),
        ):
            if found := re.match(pattern, name):
                place = int(places.was[int(found[1])])
                return None if place == NEW else name[: found.start(1)] + str(place) + name[found.end(1) :]
        return name

    def axes(self, name: str) -> Axes | None:
        """The axes of a weight; None for one that stays as it is."""
        for pattern, axes in self._rules:
            if re.fullmatch(pattern, name):
                return axes(self)
        return None

    @property
    def _rules(self) -> Sequence[tuple[str, Callable[["DenseChange"], Axes]]]:
        own = {"ple": self._gates_of_levels, "home": self._norms}.get(self.model.ranker, list)
        return [*_COMMON, *_RANKERS[self.model.ranker], *own()]

    def _gates_of_levels(self) -> "_Rules":
        config, rules = self.model.ple, list[_Rule]()
        for level in range(config.num_levels):
            gates = self.tasks if level == config.num_levels - 1 else self.streams()
            read = self.encoded(config.encoder_dims) if level == 0 else None
            rules.append((rf"ranker\.levels\.{level}\.gates\.weight", _always(gates, read, self.levels_experts())))
        return rules

    def _norms(self) -> "_Rules":
        config, rules = self.model.home, list[_Rule]()
        for i, width in enumerate(config.expert_dims):
            experts = self.home_experts(config.experts_per_group * width)
            rules.append((rf"ranker\.task\.experts\.norms\.{i}\..*", _always(experts)))
        return rules

    @cached_property
    def tasks(self) -> Axis:
        """T."""
        return Axis(self.change.tasks)

    @cached_property
    def founders(self) -> Axis:
        """Of T those that are no newcomers."""
        place = {task: i for i, task in enumerate(self.was.founders)}
        return Axis(np.array([place.get(int(self.tasks.was[t]), NEW) for t in self.now.founders], np.int64))

    @cached_property
    def _newcomers(self) -> Axis:
        place = {task: i for i, task in enumerate(self.was.newcomers)}
        return Axis(np.array([place.get(int(self.tasks.was[t]), NEW) for t in self.now.newcomers], np.int64))

    @cached_property
    def _attention(self) -> Axis:
        queries = [[f.name for f in s.id_features if f.query is not None] for s in (self.change.was, self.change.now)]
        place = {name: i for i, name in enumerate(queries[0])}
        names = self.change.feature_names
        return Axis(np.array([place.get(names.get(name, ""), NEW) for name in queries[1]], np.int64))

    @cached_property
    def numerics(self) -> Axis:
        """F."""
        return Axis(self.change.numerics, inputs=True)

    @cached_property
    def numeric_columns(self) -> Axis:
        """N."""
        return self._labelled(numeric_columns)

    @cached_property
    def columns(self) -> Axis:
        """I."""
        return self._labelled(lambda schema: input_columns(schema, self.model.table_dim))

    def _labelled(self, labels: Callable[[Schema], list[tuple[str, str, int]]]) -> Axis:
        place = {label: i for i, label in enumerate(labels(self.change.was))}
        names = self.change.feature_names
        new = [(names.get(name, ""), part, i) for name, part, i in labels(self.change.now)]
        return Axis(np.array([place.get(label, NEW) for label in new], np.int64), inputs=True)

    @cached_property
    def num_columns_was(self) -> int:
        """I before."""
        return len(input_columns(self.change.was, self.model.table_dim))

    def encoded(self, dims: tuple[int, ...]) -> Axis:
        """D."""
        return same(dims[-1]) if dims else self.columns

    def routed(self) -> Axis:
        """What a router of the ``smes`` ranker reads."""
        config = self.model.smes
        if config.router.input == "both":
            return self.columns.then(same(config.encoder_dims[-1]), self.num_columns_was)
        return self.columns if config.router.input == "raw" else self.encoded(config.encoder_dims)

    def padded(self) -> Axis:
        """What an expert of the ``smes`` ranker reads: D, and zeros up to a multiple of 8."""
        if dims := self.model.smes.encoder_dims:
            return same(dims[-1] + -dims[-1] % 8)
        new = len(self.columns.was)
        return Axis(np.concatenate([self.columns.was, np.full(-new % 8, NEW)]), inputs=True)

    def newcomers(self, width: int = 1) -> Axis:
        """``width`` places for each newcomer."""
        return self._newcomers.repeated(width)

    def streams(self) -> Axis:
        """T + 1, the shared stream of the ``ple`` ranker last."""
        return self.tasks.then(same(1), self.change.was.num_tasks)

    def levels_experts(self) -> Axis:
        """The experts of a level of the ``ple`` ranker."""
        specific, shared = self.model.ple.num_specific, self.model.ple.num_shared
        return self.tasks.repeated(specific).then(same(shared), self.change.was.num_tasks * specific)

    def home_experts(self, width: int = 1) -> Axis:
        """``width`` places for each group of experts of the ``home`` ranker's task layer."""
        groups = same(len(self.now.group_R) + 1)
        return self.tasks.then(groups, self.change.was.num_tasks).repeated(width)

    def home_rank(self) -> Axis:
        """The low-rank maps of the ``home`` ranker's first feature gates: wider where these read more."""
        gates, dims = self.model.home.feature_gates, self.model.home.encoder_dims
        old, new = (max((dims[-1] if dims else n) // gates, 1) for n in (self.num_columns_was, len(self.columns.was)))
        return Axis(np.where(np.arange(new) < old, np.arange(new), NEW))


_Rule = tuple[str, Callable[[DenseChange], Axes]]
_Rules = list[_Rule]


def _always(*axes: Axis | None) -> Callable[[DenseChange], Axes]:
    return lambda _: axes


_COMMON: _Rules = [
    (r"features\.moments\..*", lambda c: (c.numerics,)),
    (r"features\.wide_numerics", lambda c: (c.numeric_columns, c.tasks)),
    (r"heads\.hidden(_bias)?", lambda c: (c.tasks, None, None)),
    (r"heads\.out", lambda c: (c.tasks, None)),
    (r"heads\.out_bias", lambda c: (c.tasks,)),
    (r"tasks\.labels\..*", lambda c: (c.tasks,)),
    (r"tasks\.borrowing\..*", lambda c: (c.tasks, c.tasks)),
]

_ENCODER = r"ranker\.encoder\.layers\.0\.0\.weight"


def _experts(prefix: str) -> _Rules:
    return [
        (rf"{prefix}experts\.(weights\.0|down)", lambda c: (None, c.padded(), None)),
        (rf"{prefix}experts\.(base|narrow)", lambda c: (c.padded(), None)),
    ]


def _linear_up(c: DenseChange, outputs: Axis | None) -> Axes:
    """``up`` of a router that is no map for each router; it reads the input where there is no ``down``."""
    return (outputs, c.routed() if c.model.smes.router.rank is None else None)


def _up(c: DenseChange) -> Axes:
    return (None, None, None) if c.model.smes.router.maps == "own" else _linear_up(c, None)


def _newcomers_up(c: DenseChange) -> Axes:
    if c.model.smes.router.maps == "own":
        return (c.newcomers(), None, None)
    return _linear_up(c, c.newcomers(c.model.smes.experts.num))


def _newcomers_down(c: DenseChange) -> Axes:
    rank = c.model.smes.router.rank or 0
    return (c.newcomers(rank) if c.model.smes.router.maps == "own" else None, c.routed())


def _router(prefix: str) -> _Rules:
    return [
        (rf"{prefix}router\.moments\..*", lambda c: (c.routed(),)),
        (rf"{prefix}router\.down\.weight", lambda c: (None, c.routed())),
        (rf"{prefix}router\.up\.weight", _up),
    ]


_RANKERS: Mapping[str, _Rules] = {
    "linear": [],
    "shared_bottom": [(_ENCODER, lambda c: (None, c.columns))],
    "mmoe": [
        (_ENCODER, lambda c: (None, c.columns)),
        (r"ranker\.experts\.weights\.0", lambda c: (None, c.encoded(c.model.mmoe.encoder_dims), None)),
        (r"ranker\.gates\.weight", lambda c: (c.tasks, c.encoded(c.model.mmoe.encoder_dims), None)),
    ],
    "ple": [
        (_ENCODER, lambda c: (None, c.columns)),
        (
            r"ranker\.levels\.0\.experts\.weights\.0",
            lambda c: (c.levels_experts(), c.encoded(c.model.ple.encoder_dims), None),
        ),
        (r"ranker\.levels\.\d+\.experts\.weights\.\d+", lambda c: (c.levels_experts(), None, None)),
        (r"ranker\.levels\.\d+\.gates\.allowed_GN", lambda c: (c.streams(), c.levels_experts())),
    ],
    "home": [
        (_ENCODER, lambda c: (None, c.columns)),
        (r"ranker\.meta\.feature_gates\.choice", lambda c: (None, c.encoded(c.model.home.encoder_dims), None)),
        (
            r"ranker\.meta\.feature_gates\.down",
            lambda c: (None, c.encoded(c.model.home.encoder_dims), c.home_rank()),
        ),
        (
            r"ranker\.meta\.feature_gates\.up",
            lambda c: (None, Axis(c.home_rank().was, inputs=True), c.encoded(c.model.home.encoder_dims)),
        ),
        (
            r"ranker\.meta\.(experts\.weights\.0|gates\.weight|self_gates\.weight)",
            lambda c: (None, c.encoded(c.model.home.encoder_dims), None),
        ),
        (r"ranker\.task\.feature_gates\.choice", lambda c: (c.home_experts(), None, None)),
        (r"ranker\.task\.feature_gates\.(down|up)", lambda c: (c.home_experts(c.model.home.feature_gates), None, None)),
        (
            r"ranker\.task\.experts\.weights\.\d+",
            lambda c: (c.home_experts(c.model.home.experts_per_group), None, None),
        ),
        (r"ranker\.task\.gates\.weight", lambda c: (c.tasks, None, c.home_experts(c.model.home.experts_per_group))),
        (r"ranker\.task\.self_gates\.weight", lambda c: (c.tasks, None, None)),
    ],
    "smes": [
        (_ENCODER, lambda c: (None, c.columns)),
        (
            r"ranker\.trunk\.layers\.0\.0\.weight",
            lambda c: (
                None,
                c.columns if c.model.smes.trunk_input == "raw" else c.encoded(c.model.smes.encoder_dims),
            ),
        ),
        (r"ranker\.reads\.share_TG", lambda c: (c.founders, None)),
        *_experts(r"ranker\."),
        *_router(r"ranker\."),
        (r"ranker\.newcomers\.router\.moments\..*", lambda c: (c.routed(),)),
        (r"ranker\.newcomers\.router\.down\.weight", _newcomers_down),
        (r"ranker\.newcomers\.router\.up\.weight", _newcomers_up),
        *_experts(r"ranker\.newcomers\.own\.\d+\."),
        *_router(r"ranker\.newcomers\.own\.\d+\."),
    ],
}
"""Pattern of a weight's name → its axes. The first that fits counts."""
