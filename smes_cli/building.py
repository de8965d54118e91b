"""From the configuration to a learner and its evaluation, as several commands build them."""

from smes.events import ExampleBlock, FeedbackBlock, ImpressionBlock
from smes.model.config import ModelConfig
from smes.model.ids import DistinctRows, IdRows, readers, uniform_rows
from smes.model.learner import Learner
from smes.model.serving import ServingModel
from smes.schema import Schema
from smes_cli.config import Config
from stream.block_stream import BlockStream
from trainer.evaluation import ProgressiveEvaluation


def build_learner(config: Config, schema: Schema, model: ModelConfig | None = None) -> Learner:
    """A learner on the configured device, with the configured model unless another is given."""
    device = config.trainer.open_device()
    return Learner(schema, model or config.model, config.optimizer, device=device, seed=config.trainer.seed)


def build_evaluation(config: Config, learner: Learner) -> ProgressiveEvaluation:
    """Progressive evaluation of a learner; its frozen copies score on the training device."""
    device = config.trainer.open_device()
    return ProgressiveEvaluation(
        learner.schema,
        config.trainer.evaluation,
        freeze=learner.serving_state,
        build=lambda tensors: ServingModel(learner.schema, learner.config, tensors, device=device),
    )


def warm_up(config: Config, schema: Schema) -> None:
    """Take one step on a throwaway row, so that the first event does not wait for a compiler or for lazy imports."""
    examples = compile_loops(config, schema)
    learner = build_learner(config, schema)
    learner.step(learner.prepare(examples))
    ServingModel(schema, config.model, learner.serving_state()).score(examples.ids, examples.numerics)


def compile_loops(config: Config, schema: Schema) -> ExampleBlock:
    """Run every compiled loop of the join and of the id table once, on a throwaway row; returns the joined example.

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
    return examples
