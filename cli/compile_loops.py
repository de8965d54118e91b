"""Runs the loops that Numba compiles, so that nothing waits for its compiler later. Without torch."""

from cli.config import Config
from smes.events import ExampleBlock, FeedbackBlock, ImpressionBlock
from smes.id_rows import DistinctRows, IdRows, readers, uniform_rows
from smes.schema import Schema
from stream.assembler import Assembler


def compile_loops(config: Config, schema: Schema) -> ExampleBlock:
    """Run every compiled loop of the join and of the id table once on a throwaway row, which is returned joined.

    Numba keeps what it compiles on disk: only the first process after an installation takes seconds here.
    """
    impressions, feedback = ImpressionBlock.empty(schema, 1), FeedbackBlock.empty(1)
    impressions.ids[:] = 1
    assembler = Assembler(schema, config.stream.join, config.stream.batch, partitions=1)
    assembler.push(impressions, feedback)
    assembler.flush()
    examples = assembler.ready[0]
    table = IdRows(schema)
    rows_BW = table.insert(examples.ids)
    table.find(examples.ids)
    distinct_U, cells_BW = DistinctRows()(rows_BW, len(table))
    readers(cells_BW, len(distinct_U))
    uniform_rows(table.keys(), 1, config.model.embedding_scale, config.trainer.seed)
    return examples
