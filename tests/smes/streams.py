"""Small streams with known rules, for tests of the learner on any device, and the loss of scores on them."""

from dataclasses import replace

import numpy as np
from torch import Tensor

from smes.events import ExampleBlock
from smes.schema import MISSING, Feature, Schema, Task

RICH_SCHEMA = Schema(
    "rich",
    tasks=(Task("click"), Task("watch", kind="regression", max_value=600.0), Task("like", loss_weight=0.5)),
    features=(
        Feature("tags", kind="bag", vocabulary="tag", max_length=3, dim=4),
        Feature("favourite", vocabulary="tag"),
        Feature("age_s", kind="numeric", transform="log1p"),
        Feature("score", kind="numeric"),
    ),
)
"""Every kind of feature and task."""


def stream(schema: Schema, *, batches: int, size: int, items: int = 30, seed: int = 0) -> list[ExampleBlock]:
    """Make blocks in which clicks depend on user taste × item taste, the tags and a number; some values are missing.

    Args:
        schema: A schema with the columns of :data:`RICH_SCHEMA`.
        batches: How many blocks.
        size: Rows of a block.
        items: Distinct items.
        seed: Of the random draws.
    """
    rng = np.random.default_rng(seed)
    user_taste, item_taste = rng.normal(size=(20, 2)), rng.normal(size=(items, 2))
    return [_block(schema, rng, size, user_taste, item_taste) for _ in range(batches)]


def _block(
    schema: Schema,
    rng: np.random.Generator,
    size: int,
    user_taste: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
    item_taste: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
) -> ExampleBlock:
    user, item = rng.integers(0, len(user_taste), size), rng.integers(0, len(item_taste), size)
    tags = rng.integers(0, 10, (size, 3))
    tags[rng.random((size, 3)) < 0.4] = MISSING
    numerics = np.stack([rng.exponential(1000, size), rng.normal(size=size)], axis=1)
    logit = 2 * (user_taste[user] * item_taste[item]).sum(1) + (tags == 3).sum(1) + numerics[:, 1]
    click = rng.random(size) < 1 / (1 + np.exp(-logit))
    watch = np.where(click, rng.exponential(60, size), 0).clip(0, 600)
    like = click & (rng.random(size) < 0.2)
    numerics[rng.random((size, 2)) < 0.2] = np.nan
    labels = np.stack([click, watch, like], axis=1).astype(np.float32)
    mask = np.ones((size, 3), np.bool_)
    mask[:, 1] = click
    return replace(
        ExampleBlock.empty(schema, size),
        ids=np.column_stack([user, item, tags, np.where(rng.random(size) < 0.3, MISSING, tags[:, 0])]),
        numerics=numerics.astype(np.float32),
        labels=np.where(mask, labels, 0).astype(np.float32),
        label_mask=mask,
        weight=rng.uniform(0.5, 1.5, size).astype(np.float32),
        event_time_ms=np.arange(size, dtype=np.int64),
    )


def history_stream(*, batches: int, size: int, seed: int = 0) -> tuple[Schema, list[ExampleBlock]]:
    """Make blocks in which only the history, compared with the item, predicts the click.

    There are two kinds of items. A user likes one kind only, and clicks items of that kind. The history holds earlier
    items and whether the user liked them. Every user is new, and both kinds are equally common.
    """
    schema = Schema(
        "history",
        tasks=(Task("click"),),
        features=(
            Feature("recent", kind="sequence", max_length=4, vocabulary="item_id", query="item_id"),
            Feature("outcomes", kind="sequence", max_length=4, accompanies="recent"),
        ),
    )
    rng = np.random.default_rng(seed)
    blocks = []
    for _ in range(batches):
        item, recent = rng.integers(0, 20, size), rng.integers(0, 20, (size, 4))
        likes = rng.integers(0, 2, size)
        recent[rng.random((size, 4)) < 0.2] = MISSING
        recent = -np.sort(-recent, axis=1)  # what is missing comes last
        outcomes = np.where(recent == MISSING, MISSING, recent % 2 == likes[:, None])
        click = np.where((recent == MISSING).all(axis=1), rng.integers(0, 2, size), item % 2 == likes)
        ids = np.column_stack([rng.integers(0, 2**40, size), item, recent, outcomes])
        block = ExampleBlock.empty(schema, size)
        blocks.append(replace(block, ids=ids, labels=click[:, None].astype(np.float32)))
    return schema, blocks


def loss_of(schema: Schema, scores: Tensor, block: ExampleBlock) -> float:
    """The weighted loss of some scores, computed from the documented formulas.

    Args:
        schema: The tasks.
        scores: float32 [B, T], a step's result.
        block: B examples, those of the step.
    """
    score, label, mask = (array.astype(np.float64) for array in (scores.cpu().numpy(), block.labels, block.label_mask))
    total = 0.0
    for t, task in enumerate(schema.tasks):
        if task.kind == "binary":
            p = score[:, t].clip(1e-7, 1 - 1e-7)
            loss = -np.where(label[:, t] > 0, np.log(p), np.log1p(-p))
        else:
            error = np.abs(np.log1p(score[:, t]) - np.log1p(label[:, t]))
            loss = np.where(error < 1, error**2 / 2, error - 0.5)
        total += task.loss_weight * float((loss * mask[:, t] * block.weight).sum())
    return total / float(block.weight.sum())
