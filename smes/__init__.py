"""The science and the shared vocabulary: pure, no broker, store, HTTP, files or clock.

The names below are the library's front door. They are loaded on first use: whoever only reads a schema or moves events
(``import smes.schema``) does not wait for torch.

>>> import numpy as np, torch
>>> from smes import Learner, ModelConfig, OptimizerConfig, Schema, ServingModel, Task
>>> from smes.events import ExampleBlock
>>> schema = Schema("shop", tasks=(Task("click"), Task("buy")))
>>> learner = Learner(schema, ModelConfig(), OptimizerConfig(), device=torch.device("cpu"))
>>> examples = ExampleBlock.empty(schema, 4)
>>> examples.ids[:] = [[1, 10], [1, 11], [2, 10], [2, 12]]
>>> examples.labels[:, 0] = [1, 0, 1, 0]
>>> result = learner.step(learner.prepare(examples))  # scored with the weights as they were, then one step
>>> result.scores.shape, learner.step_number
(torch.Size([4, 2]), 1)
>>> model = ServingModel(schema, ModelConfig(), learner.serving_state())
>>> model.score(np.array([[1, 10], [3, 99]]), np.zeros((2, 0), np.float32)).shape
(2, 2)
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smes.learner import Learner, StepResult
    from smes.model_config import ModelConfig
    from smes.optimizer_config import OptimizerConfig
    from smes.schema import Feature, Schema, Task
    from smes.serving import ServingModel
    from smes.smes_config import SmesConfig
    from smes.smes_ranker import SMES

__all__ = [
    "SMES",
    "Feature",
    "Learner",
    "ModelConfig",
    "OptimizerConfig",
    "Schema",
    "ServingModel",
    "SmesConfig",
    "StepResult",
    "Task",
]

_HOME = {
    "SMES": "smes.smes_ranker",
    "Feature": "smes.schema",
    "Learner": "smes.learner",
    "ModelConfig": "smes.model_config",
    "OptimizerConfig": "smes.optimizer_config",
    "Schema": "smes.schema",
    "ServingModel": "smes.serving",
    "SmesConfig": "smes.smes_config",
    "StepResult": "smes.learner",
    "Task": "smes.schema",
}


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'smes' has no attribute {name!r}")
