"""Compile the loops of the join, of the id table, of the hash and of the moments, so that no event waits for them.

A module of its own because it imports no torch: the demo's process compiles before it starts its workers.
"""

from smes.events import ExampleBlock, FeedbackBlock, ImpressionBlock
from smes.hashing import splitmix64
from smes.model.ids import DistinctRows, IdRows, readers, uniform_rows
from smes.model.numeric_moments import NumericMoments
from smes.schema import Schema
from smes_cli.config import Config
from stream.block_stream import BlockStream


def compile_loops(config: Config, schema: Schema) -> ExampleBlock:
    """Run every compiled loop once, on a throwaway row; returns the joined example.

    Numba caches what it compiles on disk, so only the first process after an installation takes seconds here.
    """
    impressions, feedback = ImpressionBlock.empty(schema, 1), FeedbackBlock.empty(1)
    impressions.ids[:] = 1
    stream = BlockStream(schema, config.stream.join, config.stream.batch, iter([(impressions, feedback)]))
    while not stream.ended:
        stream.poll(0)
    examples = stream.next_batch()
    assert examples is not None, "the stream has ended, so its one impression is complete"
    table = IdRows(schema)
    rows_BW = table.insert(examples.ids)
    table.find(examples.ids)
    distinct_U, cells_BW = DistinctRows()(rows_BW, len(table))
    readers(cells_BW, len(distinct_U))
    uniform_rows(table.keys(), 1, config.model.embedding_scale, config.trainer.seed)
    splitmix64(impressions.ids[0])
    NumericMoments(schema).observe(examples.numerics)
    return examples
