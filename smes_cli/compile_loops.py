"""Compile the loops of the join, the id table, moments, routing and answers, so that no event and no request waits.

A module of its own because it imports no torch: the demo's process compiles before it starts its workers.
"""

import logging
import os
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from smes.events import ExampleBlock, FeedbackBlock, ImpressionBlock
from smes.id_map_kernels import compile_map_kernels
from smes.metric_kernels import compile_metric_kernels, count_scores
from smes.model.borrowing_kernels import compile_borrowing_kernels
from smes.model.gradient_kernels import compile_gradient_kernels
from smes.model.id_rows import IdRows
from smes.model.id_rows_kernels import not_among, not_seen_since, oldest
from smes.model.ids import uniform_rows
from smes.model.numeric_moments import NumericMoments
from smes.model.request_kernels import compile_request_kernels
from smes.model.rows_config import RowsConfig
from smes.model.serving_kernels import compile_serving_kernels
from smes.model.table_kernels import compile_kernels
from smes.model.task_kernels import compile_task_kernels
from smes.rankers.clip_kernels import compile_clip_kernels
from smes.rankers.column_kernels import compile_column_kernels
from smes.rankers.sparse.expert_kernels import compile_expert_kernels
from smes.rankers.sparse.routing_kernels import compile_routing_kernels
from smes.rankers.split_kernels import compile_split_kernels
from smes.schema import Schema
from smes_cli.config import Config
from smes_io.schema_file import load_builtin
from smes_scorer.answer_kernels import compile_answer_kernels
from stream.block_stream import BlockStream

_logger = logging.getLogger(__name__)


def compile_loops(config: Config, schema: Schema) -> ExampleBlock:
    """Run every compiled loop once, on a throwaway row; returns the joined example.

    Numba caches what it compiles on disk, so only the first process after an installation takes seconds here. Others
    compile for it: the last bits of a sum may differ between a process that has compiled a loop and one that loads it,
    and a trainer that starts again must go on with the same ones.
    """
    compile_missing()
    examples = _compile_configured(config, schema)
    for group in _GROUPS:  # from the disk; what no other process could compile fails here
        group()
    return examples


def compile_missing() -> None:
    """Compile, in other processes, what Numba has not on its disk: all of it, or nothing."""
    compile_metric_kernels()
    if sum(count_scores.stats.cache_misses.values()):
        _logger.warning("compiling loops, as once after an installation: that takes half a minute or more")
        _compile_elsewhere()


def _compile_elsewhere() -> None:
    with ExitStack() as stack:
        claims = stack.enter_context(TemporaryDirectory(prefix="smes-compile-"))
        command = [sys.executable, "-P", "-m", "smes_cli.compile_loops", claims]
        for _ in range(min(2, os.cpu_count() or 1)):
            stack.enter_context(subprocess.Popen(command, stdout=subprocess.DEVNULL))  # noqa: S603 - its own command


def _compile_some(claims: Path) -> None:
    """Compile one group after the other that no other process has claimed."""
    for group, compile_group in enumerate(_GROUPS):
        with suppress(FileExistsError):
            (claims / str(group)).touch(exist_ok=False)
            compile_group()


def _compile_configured(config: Config, schema: Schema) -> ExampleBlock:
    """Compile the loops whose types follow from the configuration or the schema."""
    impressions, feedback = ImpressionBlock.empty(schema, 1), FeedbackBlock.empty(1)
    impressions.ids[:] = 1
    stream = BlockStream(schema, config.stream.join, config.stream.batch, iter([(impressions, feedback)]))
    while not stream.ended:
        stream.poll(0)
    examples = stream.next_batch()
    assert examples is not None, "the stream has ended, so its one impression is complete"
    _compile_rows(config, schema)
    compile_kernels(bool(config.model.table_dim) + config.model.wide)
    NumericMoments(schema).observe(np.ones((1, schema.inputs.num_numerics), np.float32))
    return examples


def _compile_rows(config: Config, schema: Schema) -> None:
    rows = IdRows(schema, RowsConfig(admit_after=2, budget=1))
    ids = np.ones((1, schema.inputs.id_width), np.int64)
    batch = rows.assign(ids, 0)
    rows.find(ids)
    uniform_rows(rows.keys(batch.rows_U), 1, config.model.embedding_scale, config.trainer.seed)
    seen_s, vocabulary = np.zeros(1, np.uint32), np.zeros(1, np.int16)
    oldest(seen_s, vocabulary, np.ones(1, np.bool_), 1)
    not_seen_since(seen_s, vocabulary, np.zeros(1, np.int64))
    not_among(batch.rows_U, batch.rows_U)


_GROUPS = (
    lambda: _compile_configured(Config(), load_builtin("synthetic").schema),
    compile_map_kernels,
    compile_serving_kernels,
    compile_routing_kernels,
    compile_answer_kernels,
    compile_task_kernels,
    compile_expert_kernels,
    compile_borrowing_kernels,
    compile_split_kernels,
    compile_column_kernels,
    compile_request_kernels,
    compile_clip_kernels,
    compile_gradient_kernels,
)
"""Each compiles some loops; what takes longest comes first."""


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _compile_some(Path(sys.argv[1]))
    else:  # beforehand, as `make install` does
        compile_loops(Config(), load_builtin("synthetic").schema)
        from smes.model.shared_rows import compile_mapped_kernels  # with torch

        compile_mapped_kernels()  # for `smes serve --workers` alone
