"""Random schemas, random changes of them, and examples of both, for tests of what a change carries over."""

from dataclasses import replace
from typing import Literal

import numpy as np

from smes.events import ExampleBlock
from smes.model.config import ModelConfig
from smes.schema import MISSING, Feature, Schema, Task
from smes.schema_change import NEW, Renames, SchemaChange


def random_change(rng: np.random.Generator, *, removes: bool = False) -> SchemaChange:
    """A change of a random schema: new, renamed and reordered features and tasks, and wider bags.

    Args:
        rng: Draws it.
        removes: Whether features and tasks may go, too.
    """
    was = _schema(rng)
    features, tasks = list(was.features[2:]), list(was.tasks)
    renamed: dict[str, str] = {}
    renamed_tasks: dict[str, str] = {}
    if removes:
        features = [f for f in features if f.kind == "sequence" or rng.random() < 0.7]
        tasks = [t for t in tasks if t.name == "like" or rng.random() < 0.5]
    for i, feature in enumerate(features):
        if feature.kind == "bag" and rng.random() < 0.5:
            features[i] = feature = replace(feature, max_length=feature.max_length + 2)
        if feature.kind != "sequence" and rng.random() < 0.3:
            renamed[f"new {feature.name}"] = feature.name
            features[i] = replace(feature, name=f"new {feature.name}")
    for i, task in enumerate(tasks):
        if rng.random() < 0.3:
            renamed_tasks[f"new {task.name}"] = task.name
            tasks[i] = replace(task, name=f"new {task.name}")
    features += [_feature(rng, f"more{i}") for i in range(int(rng.integers(0, 4)))]
    tasks += [Task(f"more{i}", kind=("binary", "regression")[rng.integers(2)]) for i in range(int(rng.integers(0, 3)))]
    features = [features[i] for i in rng.permutation(len(features))]
    tasks = [tasks[i] for i in rng.permutation(len(tasks))]
    now = Schema("shop", tuple(tasks), (*was.features[:2], *features))
    return SchemaChange(was, now, Renames(renamed, renamed_tasks))


def _feature(rng: np.random.Generator, name: str) -> Feature:
    kinds: tuple[Literal["id", "bag", "numeric"], ...] = ("id", "bag", "numeric")
    kind = kinds[rng.integers(3)]
    if kind == "numeric":
        return Feature(name, kind, transform=("none", "log1p")[rng.integers(2)], indicator=bool(rng.random() < 0.6))
    return Feature(name, kind, max_length=int(rng.integers(1, 6)), dim=(None, 4, 3)[rng.integers(3)])


def _schema(rng: np.random.Generator) -> Schema:
    features = [_feature(rng, f"f{i}") for i in range(int(rng.integers(0, 6)))]
    if rng.random() < 0.5:
        recent = Feature("recent", "sequence", max_length=4, vocabulary="item_id", query="item_id")
        features += [recent, Feature("outcomes", "sequence", max_length=4, accompanies="recent")]
    features = [features[i] for i in rng.permutation(len(features))]
    tasks = [Task("like", loss_weight=0.5), Task("click"), Task("watch", kind="regression")]
    return Schema("shop", tuple(tasks[: int(rng.integers(2, 4))]), tuple(features))


def examples(rng: np.random.Generator, schema: Schema, size: int) -> ExampleBlock:
    """Random examples; a fifth of the values is missing, and a tenth of the labels."""
    ids = rng.integers(0, 40, (size, schema.id_width))
    ids[rng.random(ids.shape) < 0.2] = MISSING
    for feature in schema.id_features:
        if feature.accompanies is not None:
            entries = ids[:, schema.id_slices[feature.accompanies]]
            ids[:, schema.id_slices[feature.name]] = np.where(entries == MISSING, MISSING, entries % 4)
    numerics = 10 * rng.normal(size=(size, schema.num_numerics))
    numerics[rng.random(numerics.shape) < 0.2] = np.nan
    labels = (rng.random((size, schema.num_tasks)) < 0.3).astype(np.float32)
    return replace(
        ExampleBlock.empty(schema, size),
        ids=ids,
        numerics=numerics.astype(np.float32),
        labels=labels,
        label_mask=rng.random(labels.shape) < 0.9,
        weight=rng.uniform(0.5, 1.5, size).astype(np.float32),
        event_time_ms=np.full(size, 1_700_000_000_000),
    )


def with_new_values(rng: np.random.Generator, change: SchemaChange, block: ExampleBlock) -> ExampleBlock:
    """Examples of the schema before under the new one, with values of the new features; old lists stay as they are."""
    block = change.examples(block)
    more = examples(rng, change.now, len(block))
    new_W = change.id_columns == NEW
    for feature in change.now.id_features:
        if feature.name in change.feature_names:
            new_W[change.now.id_slices[feature.name]] = False
    return replace(
        block,
        ids=np.where(new_W, more.ids, block.ids),
        numerics=np.where(change.numerics == NEW, more.numerics, block.numerics),
    )


def with_tasks_of(model: ModelConfig, schema: Schema) -> ModelConfig:
    """The configuration with those declared groups whose tasks the schema has."""
    names = {t.name for t in schema.tasks}

    def known(groups: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        kept = {group: tuple(name for name in tasks if name in names) for group, tasks in groups.items()}
        return {group: tasks for group, tasks in kept.items() if tasks}

    groups = replace(model.smes.groups, declared=known(model.smes.groups.declared))
    return replace(
        model,
        smes=replace(model.smes, groups=groups),
        home=replace(model.home, groups=known(model.home.groups)),
    )
