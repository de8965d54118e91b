"""The other libraries of the speed benchmark, unmodified: torch-rechub's MMoE and PLE, deepctr-torch's MMoE.

A step is what the library's own trainer does with a batch, less the data loader, progress bar, metrics and the
regularisation that we have none of: forward, a binary cross-entropy per task, backward, Adam. Ids and labels are
tensors before the clock starts, and ids are row numbers: these libraries look nothing up. Adam is torch's fused one,
which is faster than the default that both would use. A scoring call is the forward pass in inference mode, on such
tensors.

deepctr-torch asks PyPI for its newest version when it is imported, in a thread, and prints a line where it cannot.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.speed_setting import Contender, Data, Setting

PEER_MODULES = {"torch_rechub": "torch-rechub", "deepctr_torch": "deepctr-torch"}


def missing_peers(peers: Mapping[str, str] = PEER_MODULES) -> list[str]:
    """Names, on the package index, of the peers (module → package) that are not installed."""
    return [package for module, package in peers.items() if importlib.util.find_spec(module) is None]


def rechub_mmoe(num_experts: int, setting: Setting, data: Data) -> Contender:
    """torch-rechub's MMoE: experts Linear → BatchNorm → ReLU, linear towers."""
    multi_task = importlib.import_module("torch_rechub.models.multi_task")
    model = multi_task.MMOE(n_expert=num_experts, **_rechub_arguments(setting))
    what = f"torch-rechub MMoE, {num_experts} experts"
    return _rechub_contender(f"rechub_mmoe{num_experts}", what, model, setting, data)


def rechub_ple(setting: Setting, data: Data) -> Contender:
    """torch-rechub's PLE: one level, one expert per task and one shared."""
    multi_task = importlib.import_module("torch_rechub.models.multi_task")
    model = multi_task.PLE(n_level=1, n_expert_specific=1, n_expert_shared=1, **_rechub_arguments(setting))
    name = f"rechub_ple{setting.num_tasks + 1}"
    what = f"torch-rechub PLE, 1 level, {setting.num_tasks} × 1 + 1 experts"
    return _rechub_contender(name, what, model, setting, data)


def deepctr_mmoe(num_experts: int, setting: Setting, data: Data) -> Contender:
    """deepctr-torch's MMoE: experts Linear → ReLU, linear gates and towers, no L2."""
    models = importlib.import_module("deepctr_torch.models")
    inputs = importlib.import_module("deepctr_torch.inputs")
    model = models.MMOE(
        [inputs.SparseFeat(name, setting.vocabulary, setting.embedding_dim) for name in _fields(setting)],
        num_experts=num_experts,
        expert_dnn_hidden_units=setting.expert_dims,
        gate_dnn_hidden_units=(),
        tower_dnn_hidden_units=(),
        l2_reg_linear=0,
        l2_reg_embedding=0,
        task_types=["binary"] * setting.num_tasks,
        task_names=[f"task{i}" for i in range(setting.num_tasks)],
    )
    # The library takes one matrix of floats and casts ids back to integers.
    batches = [torch.from_numpy(batch.ids).float() for batch in data.batches]
    labels = [torch.from_numpy(batch.labels) for batch in data.batches]

    def loss(n: int) -> Tensor:
        scores_BT = model(batches[n])
        losses = [
            F.binary_cross_entropy(scores_BT[:, i], labels[n][:, i], reduction="sum") for i in range(setting.num_tasks)
        ]
        return torch.stack(losses).sum()

    name, what = f"deepctr_mmoe{num_experts}", f"deepctr-torch MMoE, {num_experts} experts"
    candidates = torch.from_numpy(data.candidates).float()
    return _contender(name, what, model, loss, candidates, len(batches), setting)


def _rechub_arguments(setting: Setting) -> dict[str, Any]:
    features = importlib.import_module("torch_rechub.basic.features")
    return {
        "features": [
            features.SparseFeature(name, vocab_size=setting.vocabulary, embed_dim=setting.embedding_dim)
            for name in _fields(setting)
        ],
        "task_types": ["classification"] * setting.num_tasks,
        "expert_params": {"dims": list(setting.expert_dims)},
        "tower_params_list": [{"dims": []}] * setting.num_tasks,
    }


def _rechub_contender(name: str, what: str, model: Any, setting: Setting, data: Data) -> Contender:
    def columns(ids: Any) -> dict[str, Tensor]:
        return {field: torch.from_numpy(ids[:, i].copy()) for i, field in enumerate(_fields(setting))}

    batches = [columns(batch.ids) for batch in data.batches]
    labels = [torch.from_numpy(batch.labels) for batch in data.batches]

    def loss(n: int) -> Tensor:
        scores_BT = model(batches[n])
        losses = [F.binary_cross_entropy(scores_BT[:, i], labels[n][:, i]) for i in range(setting.num_tasks)]
        return torch.stack(losses).sum() / setting.num_tasks

    return _contender(name, what, model, loss, columns(data.candidates), len(batches), setting)


def _contender(
    name: str,
    what: str,
    model: nn.Module,
    loss: Callable[[int], Tensor],
    candidates: object,
    num_batches: int,
    setting: Setting,
) -> Contender:
    optimizer = torch.optim.Adam(model.parameters(), lr=setting.peer_learning_rate, fused=True)

    def train(n: int) -> float:
        model.train()
        optimizer.zero_grad()
        value = loss(n % num_batches)
        value.backward()  # type: ignore[no-untyped-call]  # torch ships no type for it
        optimizer.step()
        return value.item()

    def score() -> object:
        model.eval()
        with torch.inference_mode():
            return model(candidates)

    embeddings = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    return Contender(name, what, train, score, sum(p.numel() for p in model.parameters()) - embeddings)


def _fields(setting: Setting) -> list[str]:
    return [feature.name for feature in setting.schema.id_features]
