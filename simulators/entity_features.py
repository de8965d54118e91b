"""Features of users and items for the online store, in exactly the encoding that impressions carry.

Both come out of the same SQL (:mod:`simulators.log_sql`), so that a model sees at scoring time what it was trained on.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from simulators.log_reader import Entity, LogReader, open_log
from simulators.schema_file import SchemaFile
from smes.events import I64

ENTITIES: tuple[Entity, ...] = ("user", "item")


def entity_features(
    log: LogReader | str | Path, schema_file: SchemaFile
) -> Iterator[tuple[Entity, I64, dict[str, NDArray[Any]]]]:
    """Every user's and item's features: of the log's feature tables, or else the latest values in the log itself.

    Args:
        log: An opened log, or where it lies.
        schema_file: Which features there are and where they are found.

    Yields:
        Entity, ids int64 [N] (each id once over all blocks of an entity), and feature name → int64 [N] (id),
        int64 [N, max_length] (bag, padded with ``MISSING``) or float32 [N] (numeric, NaN where absent).

    Raises:
        LogError: A file or column is missing or unusable.
    """
    if not isinstance(log, LogReader):
        with open_log(log, schema_file) as reader:
            yield from entity_features(reader, schema_file)
        return
    for entity in ENTITIES:
        for block in log.entity_blocks(entity):
            yield block.entity, block.ids, block.columns
