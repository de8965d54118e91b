"""SMES Online's model as a library: no broker, no store, no HTTP, no files, no clock.

The names below are the public surface. They are loaded on first use, so a program that only reads a schema or moves
events (``import smes.schema``) does not wait for torch.

One training step, then scoring with the trained weights:

>>> import numpy as np, torch
>>> from smes import SMES, Learner, ModelConfig, OptimizerConfig, Schema, ServingModel, SmesConfig, Task
>>> from smes.events import ExampleBlock
>>> schema = Schema("shop", tasks=(Task("click"), Task("buy")))
>>> learner = Learner(schema, ModelConfig(), OptimizerConfig(), device=torch.device("cpu"))
>>> examples = ExampleBlock.empty(schema, 4)
>>> examples.ids[:] = [[1, 10], [1, 11], [2, 10], [2, 12]]  # user, item
>>> examples.labels[:, 0] = [1, 0, 1, 0]  # clicks
>>> result = learner.step(learner.prepare(examples))  # the scores are those before the step
>>> result.scores.shape, learner.step_number
(torch.Size([4, 2]), 1)
>>> model = ServingModel.from_state(schema, ModelConfig(), learner.serving_state())
>>> model.score(np.array([[1, 10], [3, 99]]), np.zeros((2, 0), np.float32)).shape
(2, 2)

SMES alone is a ``torch.nn.Module``: vectors in, one representation per task out.

>>> _ = torch.manual_seed(0)
>>> ranker = SMES(input_dim=64, num_tasks=3, config=SmesConfig(), group_T=(0, 0, 1))  # the third routes by itself
>>> output = ranker(torch.randn(256, 64))  # 256 instances, 64 numbers each
>>> output.tasks_BTH.shape == (256, 3, ranker.output_dim), output.stats.active_B.shape  # experts run for an instance
(True, torch.Size([256]))
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smes.model.config import ModelConfig, OptimizerConfig, model_preset
    from smes.model.learner import Learner
    from smes.model.serving import ServingModel
    from smes.model.step_result import StepResult
    from smes.rankers.sparse.config import (
        BalanceConfig,
        EarlyConfig,
        ExpertsConfig,
        GroupsConfig,
        RouterConfig,
        SmesConfig,
        smes_default,
        smes_large,
        smes_paper,
    )
    from smes.rankers.sparse.ranker import SMES
    from smes.schema import Derived, Feature, History, Schema, Task

__all__ = [
    "SMES",
    "BalanceConfig",
    "Derived",
    "EarlyConfig",
    "ExpertsConfig",
    "Feature",
    "GroupsConfig",
    "History",
    "Learner",
    "ModelConfig",
    "OptimizerConfig",
    "RouterConfig",
    "Schema",
    "ServingModel",
    "SmesConfig",
    "StepResult",
    "Task",
    "model_preset",
    "smes_default",
    "smes_large",
    "smes_paper",
]

_MODULES = {
    "smes.model.config": ("ModelConfig", "OptimizerConfig", "model_preset"),
    "smes.model.learner": ("Learner",),
    "smes.model.step_result": ("StepResult",),
    "smes.model.serving": ("ServingModel",),
    "smes.rankers.sparse.config": (
        *("BalanceConfig", "EarlyConfig", "ExpertsConfig", "GroupsConfig", "RouterConfig", "SmesConfig"),
        *("smes_default", "smes_large", "smes_paper"),
    ),
    "smes.rankers.sparse.ranker": ("SMES",),
    "smes.schema": ("Derived", "Feature", "History", "Schema", "Task"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'smes' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
