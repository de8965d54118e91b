"""The topics of the event log, and which partition of them a key belongs to. Letters: N keys."""

import numpy as np

from smes.arrays import I32, I64
from smes.hashing import splitmix64

IMPRESSIONS = "impressions"
"""Items shown to users (:class:`smes.events.ImpressionBlock` on the wire)."""

FEEDBACK = "feedback"
"""Outcomes of impressions (:class:`smes.events.FeedbackBlock` on the wire)."""

EXAMPLES = "examples"
"""Joined examples, for trainers that do not join themselves (:mod:`stream.joined`)."""

DEAD_LETTERS = "dead_letters"
"""Records that could not be used, with topic, partition, offset and reason."""


def partition_of(keys: I64, partitions: int) -> I32:
    """Partition of each key, evenly spread also when the keys are consecutive or share their low bits.

    Args:
        keys: int64 [N], such as impression ids, so that an impression and its feedback meet in one partition number.
        partitions: Number of partitions of the topic, at least 1.

    Returns:
        int32 [N], ``0 … partitions - 1``.

    Raises:
        ValueError: ``partitions`` is less than 1.
    """
    if partitions < 1:
        raise ValueError(f"partitions {partitions}, expected at least 1")
    return (splitmix64(keys) % np.uint64(partitions)).astype(np.int32)
