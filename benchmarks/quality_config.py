"""What is compared: ``quality.yaml``, and the settings that tuning chose.

Settings are dotted keys of :class:`smes_cli.config.Config`. A ranker's are, one over the other: those common to its
comparison, those of the ranker that it is ``like``, its own, and its own chosen trial. One without trials also takes
the chosen trial of the one that it is ``like``.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import ConfigDict

from smes.model.config import model_preset
from smes_cli.config import Config
from smes_io.yaml_file import STRICT, read_mapping, validated

DEFAULT_FILE = Path(__file__).with_name("quality.yaml")
CHOSEN_FILE = Path(__file__).with_name("quality_chosen.yaml")

Settings = dict[str, Any]


@dataclass(frozen=True)
class RankerEntry:
    """One ranker of a comparison.

    Attributes:
        like: The ranker whose settings it starts from.
        settings: Its own.
        in_world: Its own in one synthetic world, by that one's name.
        trials: What tuning tries, one after the other; none for an ablation, which takes those of what it is like.
    """

    like: str | None = None
    settings: Settings = field(default_factory=dict)
    in_world: dict[str, Settings] = field(default_factory=dict)
    trials: tuple[Settings, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Rankers on one kind of data.

    Attributes:
        smes: The ranker that stands for SMES.
        paper: The ranker in the paper's own form.
        linear: The floor.
        dense: The rivals, as they were published.
        dense_same_learning: The rivals with whatever SMES's default has in learning, if that is compared, too.
        experts: Rankers that differ in the number of experts, by that number.
        common: Settings of all.
        rankers: All of them, by name.
    """

    smes: str
    paper: str
    linear: str
    dense: tuple[str, ...]
    rankers: dict[str, RankerEntry]
    common: Settings = field(default_factory=dict)
    experts: dict[int, str] = field(default_factory=dict)
    dense_same_learning: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        named = [*self.experts.values(), *(entry.like for entry in self.rankers.values() if entry.like)]
        for name in (self.smes, self.paper, self.linear, *self.dense, *self.dense_same_learning, *named):
            if name not in self.rankers:
                raise ValueError(f"ranker {name!r}: expected one of {sorted(self.rankers)}")
        budgets = {name: len(entry.trials) for name, entry in self.rankers.items() if entry.trials}
        if len(set(budgets.values())) > 1:
            raise ValueError(f"trials: {budgets}, expected the same number for every ranker that is tuned")

    def without(self, keep: tuple[str, ...]) -> tuple[str, ...]:
        """Names of the rankers, in order, restricted to ``keep`` where that is not empty.

        Raises:
            ValueError: There is no such ranker.
        """
        if unknown := sorted(set(keep) - set(self.rankers)):
            raise ValueError(f"rankers {unknown}: expected names among {sorted(self.rankers)}")
        return tuple(name for name in self.rankers if not keep or name in keep)


@dataclass(frozen=True)
class QualityConfig:
    """All comparisons: in the worlds whose tasks have many positives, in those with rare tasks, and on KuaiRand."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    worlds: Comparison
    rare_worlds: Comparison
    kuairand: Comparison


Chosen = dict[str, dict[str, Settings]]
"""Comparison → ranker → its chosen trial."""


def load_quality(path: Path = DEFAULT_FILE) -> QualityConfig:
    """Read what is compared.

    Raises:
        ValueError: One line with file, key, value and what was expected.
    """
    return validated(QualityConfig, read_mapping(path), path)


def load_chosen(path: Path = CHOSEN_FILE) -> Chosen:
    """What tuning chose; nothing where it was not run.

    Raises:
        ValueError: The file is no mapping.
    """
    return read_mapping(path) if path.exists() else {}


def save_chosen(chosen: Chosen, path: Path) -> None:
    """Write what tuning chose."""
    head = "# Written by `python -m benchmarks.quality --tune`: the best trial of each ranker in quality.yaml.\n"
    path.write_text(head + yaml.safe_dump(chosen, sort_keys=True), encoding="utf-8")


def settings_of(
    comparison: Comparison, name: str, chosen: Mapping[str, Settings], world: str | None = None
) -> Settings:
    """The settings of a ranker, dotted.

    Args:
        comparison: Whose ranker it is.
        name: Of the ranker.
        chosen: Ranker → the trial that tuning chose.
        world: The synthetic world in which it runs; None elsewhere.
    """
    entry = comparison.rankers[name]
    # What a ranker with trials starts from is the same when these are tried and when the chosen one runs.
    inherited = {} if entry.trials else chosen
    below = settings_of(comparison, entry.like, inherited, world) if entry.like else comparison.common
    own = {**entry.settings, **(entry.in_world.get(world, {}) if world else {})}
    return {**below, **own, **(chosen.get(name, {}) if entry.trials else {})}


def build_config(settings: Settings, where: str) -> Config:
    """A configuration from dotted keys; ``model.preset`` chooses the values that the others change.

    Raises:
        ValueError: A key is unknown, or a value out of range; ``where`` leads the message.
    """
    preset = settings.get("model.preset", "default")
    data: dict[str, Any] = {"model": model_preset(preset).to_dict()}
    for path, value in settings.items():
        if path == "model.preset":
            continue
        *parents, key = path.split(".")
        section = data
        for parent in parents:
            section = section.setdefault(parent, {})
        section[key] = value
    return validated(Config, data, where)


def key_of(config: Config, **more: Any) -> str:
    """What tells one run from another: everything in the configuration that can change it, and ``more``.

    The shapes of other rankers than the configured one are left out, so that a new key of one ranker leaves the runs of
    the others in the cache.
    """
    model = config.model.to_dict()
    used = {k: v for k, v in model.items() if not isinstance(v, dict) or k == config.model.ranker}
    parts = {
        "model": used,
        "optimizer": asdict(config.optimizer),
        "stream": asdict(config.stream),
        "evaluation": asdict(config.trainer.evaluation),
        **more,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
