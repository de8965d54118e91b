"""Lineages: names of uninterrupted histories of weights, and which one a trainer publishes under."""

import logging
import uuid
from collections.abc import Sequence

from feature_store.manifest import Manifest

_logger = logging.getLogger(__name__)


def lineage_to_publish(lineage: str, step: int, served: Manifest | None, listed: Sequence[Manifest] = ()) -> str:
    """The lineage under which a trainer publishes: its own, or a fork of it.

    If serving already has a later version of the trainer's lineage, the trainer died after its last checkpoint. What it
    trains now is another history from that checkpoint on. It gets a name of its own, so that no version names two sets
    of weights. Likewise if another lineage is served by now, a fork that died before its first checkpoint, and this
    version or a later one was published before.

    Args:
        lineage: The trainer's lineage.
        step: Steps taken.
        served: Manifest of the snapshot that is served, if any.
        listed: The snapshots that the store has.
    """
    if served is None:
        return lineage
    if served.lineage != lineage:
        published = max((m.version for m in listed if m.lineage == lineage), default=-1)
        if published >= step:
            return _forked(lineage, step, published)
        _logger.log(
            logging.INFO if root_of(served.lineage) == root_of(lineage) else logging.WARNING,
            "version %d of lineage %s is served; lineage %s takes its place with its first cut",
            served.version,
            served.lineage,
            lineage,
        )
        return lineage
    if served.version <= step:
        return lineage
    return _forked(lineage, step, served.version)


def first_step_to_publish(
    lineage: str, served: Manifest | None, *, unreadable: bool, steps_before_replacing: int
) -> int:
    """From which step on weights of a lineage may be published: at once where nothing is in service.

    Args:
        lineage: Theirs.
        served: Manifest of the snapshot that is served; None if there is none, or it cannot be read.
        unreadable: Whether there is one that cannot be read.
        steps_before_replacing: Steps before they replace weights of a lineage that they do not descend from, ≥ 1.
    """
    if served is None and not unreadable:
        return 0
    stranger = served is None or root_of(served.lineage) != root_of(lineage)
    return steps_before_replacing if stranger else 1


def _forked(lineage: str, step: int, published: int) -> str:
    forked = new_lineage(lineage)
    _logger.warning(
        "version %d of lineage %s was published but the checkpoint is of step %d: continuing as lineage %s",
        published,
        lineage,
        step,
        forked,
    )
    return forked


def new_lineage(parent: str | None = None) -> str:
    """A name for a new history of weights; the name of a fork begins with the root of its parent's name."""
    return f"{root_of(parent)}.{uuid.uuid4().hex[:4]}" if parent else uuid.uuid4().hex[:8]


def root_of(lineage: str) -> str:
    """The name that a lineage shares with all that it forked from."""
    return lineage.partition(".")[0]
