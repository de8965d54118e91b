"""No request waits for a compiler: what scoring runs is compiled before the first version is ready."""

import subprocess
import sys

SCRIPT = """
import numpy as np
import torch
from numba.core.dispatcher import Dispatcher
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.learner import Learner
from smes.model.serving import ServingModel
from smes.schema import Feature, Schema, Task
from smes_scorer.service import compile_answering

schema = Schema("s", tasks=(Task("a"), Task("b")), features=tuple(Feature(f"f{i}") for i in range(30)))
learner = Learner(schema, ModelConfig(), OptimizerConfig(), device=torch.device("cpu"))
model = ServingModel.from_state(schema, learner.config, learner.serving_state())
compile_answering()
compiled, compile_now = [], Dispatcher.compile
Dispatcher.compile = lambda self, signature: compiled.append(self.py_func.__name__) or compile_now(self, signature)
ids = np.ones((200, schema.id_width), np.int64)
ids[:, 1] = np.arange(200)
numerics = np.zeros((200, 0), np.float32)
model.score(ids, numerics)
model.score(ids, numerics, requests=np.arange(200))
assert model._splits._known, "both ways were tried"
assert not compiled, compiled
"""


def test_a_first_request_compiles_nothing() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
