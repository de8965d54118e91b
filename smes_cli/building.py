"""From the configuration to a learner and its evaluation, as several commands build them."""

from concurrent.futures import Executor, Future

from smes.arrays import F32, Arrays
from smes.events import ExampleBlock
from smes.model.config import ModelConfig
from smes.model.frozen_model import FrozenModel, KeptModel
from smes.model.learner import Learner
from smes.model.serving import ServingModel
from smes.schema import Schema
from smes.world import ALONE, World
from smes_cli.compile_loops import compile_loops
from smes_cli.config import Config
from trainer.evaluation import FrozenModel as AnyFrozenModel
from trainer.evaluation import ProgressiveEvaluation
from trainer.gate import PublishGate
from trainer.gated_cuts import GatedCuts


def build_learner(config: Config, schema: Schema, model: ModelConfig | None = None, world: World = ALONE) -> Learner:
    """A learner on the configured device, with the configured model unless another is given.

    Args:
        config, schema, model: See above.
        world: The ranks that train together.
    """
    device, half = config.trainer.open_device(), config.trainer.cpu_precision == "bf16"
    return Learner(
        schema,
        model or config.model,
        config.optimizer,
        config.rows,
        device=device,
        seed=config.trainer.seed,
        half=half,
        world=world,
    )


def build_evaluation(config: Config, learner: Learner, beside: Executor | None = None) -> ProgressiveEvaluation:
    """Progressive evaluation of a learner; its frozen copies score on the training device.

    Args:
        config: Window bounds and device.
        learner: Its weights.
        beside: Runs what scores while the training goes on; None, or on a GPU: the training waits for the scores.
    """
    device = config.trainer.open_device()

    def start(frozen: AnyFrozenModel, examples: ExampleBlock) -> Future[F32]:
        assert isinstance(frozen, FrozenModel)
        assert beside is not None
        return beside.submit(frozen.later(examples.ids, examples.numerics, examples.event_time_ms))

    return ProgressiveEvaluation(
        learner.schema,
        config.trainer.evaluation,
        freeze=lambda: FrozenModel.freeze(learner, device),
        thaw=lambda state: FrozenModel.thaw(learner, state, device),
        start=start if beside is not None and device.type == "cpu" else None,
    )


def build_gate(config: Config, learner: Learner) -> GatedCuts | None:
    """The publish gate of a learner, if it is enabled; the version in service scores on the training device."""
    gate = config.trainer.gate
    if not gate.enabled:
        return None
    device, goes_back = config.trainer.open_device(), gate.then == "go_back"

    def thaw(state: Arrays) -> FrozenModel:
        again = KeptModel.keep_again if goes_back else FrozenModel.thaw
        return again(learner, state, device)

    return GatedCuts(
        PublishGate(learner.schema, gate, thaw=thaw),
        reference=lambda: FrozenModel.freeze(learner, device),
        keep=lambda: KeptModel.keep(learner, device),
    )


def warm_up(config: Config, schema: Schema) -> None:
    """Take one step on a throwaway row, so that the first event does not wait for a compiler or for lazy imports."""
    examples = compile_loops(config, schema)
    learner = build_learner(config, schema)
    learner.step(learner.prepare(examples))
    served = ServingModel.from_state(schema, config.model, learner.serving_state())
    served.score(examples.ids, examples.numerics, examples.event_time_ms)
