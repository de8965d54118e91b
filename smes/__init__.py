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
    from smes.model.config import ModelConfig, OptimizerConfig
    from smes.model.learner import Learner, StepResult
    from smes.model.serving import ServingModel
    from smes.rankers.sparse.config import SmesConfig
    from smes.rankers.sparse.ranker import SMES
    from smes.schema import Feature, Schema, Task

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
    "SMES": "smes.rankers.sparse.ranker",
    "Feature": "smes.schema",
    "Learner": "smes.model.learner",
    "ModelConfig": "smes.model.config",
    "OptimizerConfig": "smes.model.config",
    "Schema": "smes.schema",
    "ServingModel": "smes.model.serving",
    "SmesConfig": "smes.rankers.sparse.config",
    "StepResult": "smes.model.learner",
    "Task": "smes.schema",
}


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'smes' has no attribute {name!r}")
