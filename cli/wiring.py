"""From the configuration to objects: what several commands build the same way."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGINT, SIGTERM, signal
from types import FrameType
from typing import Any

from cli.config import Config
from smes.errors import SmesError
from smes.events import FeedbackBlock, ImpressionBlock
from smes.learner import Learner
from smes.model_config import ModelConfig
from smes.schema import Schema
from smes.serving import ServingModel
from stream.assembler import Assembler
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
    """Run every compiled loop once on a throwaway row, so that the first event does not wait for the compiler.

    Numba keeps what it compiles on disk: only the first process after an installation takes seconds here.
    """
    impressions, feedback = ImpressionBlock.empty(schema, 1), FeedbackBlock.empty(1)
    impressions.ids[:] = 1
    assembler = Assembler(schema, config.stream.join, config.stream.batch, partitions=1)
    assembler.push(impressions, feedback)
    assembler.flush()
    learner = build_learner(config, schema)
    examples = assembler.ready[0]
    learner.step(learner.prepare(examples))
    ServingModel(schema, config.model, learner.serving_state()).score(examples.ids, examples.numerics)


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Turns SIGINT and SIGTERM into an answer to "should I stop?"; a second SIGINT interrupts as usual."""
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped.is_set() and number == SIGINT:
            raise KeyboardInterrupt
        stopped.set()

    before = {number: signal(number, stop) for number in (SIGINT, SIGTERM)}
    try:
        yield stopped.is_set
    finally:
        for number, handler in before.items():
            signal(number, handler)


def write_report(report: dict[str, Any], path: Path | None, *, indent: int | None = 2) -> None:
    """Write a report as JSON, if a path is given.

    Raises:
        SmesError: The file cannot be written.
    """
    if path is None:
        return
    try:
        path.write_text(json.dumps(report, indent=indent, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise SmesError(f"report {path}: cannot be written: {error.strerror}") from error


def read_report(path: Path, otherwise: str) -> dict[str, Any]:
    """A report that another process wrote.

    Args:
        path: Where.
        otherwise: What that process last said, for the error.

    Raises:
        SmesError: It wrote none.
    """
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SmesError(
            f"report {path.name}: expected one, but its process left none ({error}):\n{otherwise}"
        ) from error
    return report
