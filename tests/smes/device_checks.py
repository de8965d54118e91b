"""Checks that must pass on every device. ``tests/smes`` runs them on the CPU, ``tests/gpu`` on a GPU.

This module imports only the package, what the package imports, and two modules of ``tests/smes``: the streams and the
plain configuration. So it runs on a machine that has nothing else.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.devices import open_device
from smes.model.learner import Learner
from smes.model.serving import ServingModel
from smes.model.step_result import StepResult
from smes.rankers.sparse.config import SmesConfig
from smes.rankers.sparse.experts import FullExperts
from smes.rankers.sparse.packing import combine, dispatch
from smes.rankers.sparse.routing import Routing, route
from tests.smes.plain_smes import changed, plain
from tests.smes.streams import RICH_SCHEMA, loss_of, stream

CPU = torch.device("cpu")
MODEL = ModelConfig(
    embedding_dim=8,
    smes=plain({"experts.num": 8, "num_shared": 1, "num_adaptive": 2, "encoder_dims": (32,), "experts.dims": (32, 16)}),
)
RANKERS = {
    "smes": MODEL,
    "smes-own-pools": replace(
        MODEL,
        smes=plain(
            {
                "experts.num": 9,
                "num_shared": 1,
                "num_group": 1,
                "num_adaptive": 2,
                "shared_experts": "always_on",
                "groups.pools": "own",
                "max_active": 7,
                "experts.form": "residual",
                "router.rank": 8,
                "router.maps": "own",
                "router.input": "both",
                "router.norm": "batch",
                "encoder_dims": (32,),
                "experts.dims": (16,),
                "trunk_dims": (16,),
            }
        ),
    ),
    "smes-group-routers": replace(
        MODEL,
        smes=plain(
            {
                "experts.num": 8,
                "num_shared": 1,
                "num_group": 2,
                "num_adaptive": 0,
                "router.per": "group",
                "encoder_dims": (),
                "experts.form": "low_rank",
                "experts.norm": "rms",
                "router.norm": "layer",
                "experts.dims": (16,),
            }
        ),
    ),
    "smes-default": replace(MODEL, smes=SmesConfig()),
    "linear": replace(MODEL, ranker="linear"),
}
"""Models by name; :func:`check_choices` takes these."""
STEPPED = {
    **RANKERS,
    # Its final choices differ from those that it makes early in the stream, so check_choices does not apply.
    "smes-searching": replace(
        MODEL, smes=changed(SmesConfig(), {"groups.found": 2, "early.num_group": 8, "early.until": 256})
    ),
}
"""Models by name; :func:`check_steps_follow_the_cpu` takes these."""


def make_learner(device: torch.device, ranker: str = "smes") -> Learner:
    """Make a learner of the rich schema, with the same first weights on every device."""
    return Learner(RICH_SCHEMA, STEPPED[ranker], OptimizerConfig(), device=device, seed=1)


def check_grouped_execution(device: torch.device) -> None:
    """Grouped experts have the values and gradients of a dense float32 loop on the CPU, within the device's precision.

    The routing is fixed, so rounding cannot lead to other experts.
    """
    torch.manual_seed(0)
    experts = FullExperts(8, 32, (32, 16))
    h_BD, z_BRE = torch.randn(64, 32), torch.randn(64, 3, 8)
    routing = route(z_BRE, torch.full((3,), 1 / 3), 1, 2)
    probe_BTH = torch.randn(64, 3, 16)
    expected = _outcome(experts, h_BD, lambda h: (_dense(experts, h, routing) * probe_BTH).sum())
    moved = replace(routing, experts_BRK=routing.experts_BRK.to(device), weights_BRK=routing.weights_BRK.to(device))
    plan = dispatch(moved, trim=device.type == "cpu")
    experts.to(device)
    probe = probe_BTH.to(device)

    def grouped(h: Tensor) -> Tensor:
        with open_device(device).autocast():
            return (combine(experts(h, plan), moved.weights_BRK, plan).float() * probe).sum()

    got = _outcome(experts, h_BD.to(device), grouped)
    tolerance = 1e-4 if device.type == "cpu" else 3e-2  # bfloat16 keeps 8 bits
    for name, value in expected.items():
        error = (got[name].cpu() - value).norm() / value.norm()
        assert torch.isfinite(got[name]).all(), name
        assert float(error) < tolerance, f"{name}: relative error {float(error):.4f}, expected below {tolerance}"


def check_steps_follow_the_cpu(device: torch.device, ranker: str) -> None:
    """One stream on the device and on the CPU gives nearly the same scores, losses and tables."""
    blocks = stream(RICH_SCHEMA, batches=20, size=128)
    reference, learner = make_learner(CPU, ranker), make_learner(device, ranker)
    for block in blocks:
        expected = reference.step(reference.prepare(block))
        got = learner.step(learner.prepare(block))
        assert got.scores.device.type == device.type
        binary = got.scores.cpu()[:, [0, 2]]
        assert torch.isfinite(binary).all()
        assert float((binary - expected.scores[:, [0, 2]]).abs().mean()) < 0.02
        losses = [loss_of(RICH_SCHEMA, result.scores, block) for result in (got, expected)]
        assert abs(losses[0] - losses[1]) < 0.03 * losses[1]
    assert learner.num_rows == reference.num_rows
    difference = learner.serving_state()["table.wide"] - reference.serving_state()["table.wide"]
    assert float(difference.norm() / reference.serving_state()["table.wide"].norm()) < 0.1


def check_a_replayed_step(device: torch.device) -> None:
    """After a restart, the next step gives the same scores and, up to the order of sums, the same weights."""
    blocks = stream(RICH_SCHEMA, batches=6, size=128, items=4000)
    whole, restarted = make_learner(device), make_learner(device)
    for block in blocks[:5]:
        whole.step(whole.prepare(block))
    restarted.load_state(whole.state())
    expected, got = (learner.step(learner.prepare(blocks[5])) for learner in (whole, restarted))
    torch.testing.assert_close(got.scores, expected.scores, rtol=1e-5, atol=1e-6)
    a, b = restarted.state(), whole.state()
    assert a.keys() == b.keys()
    for name in a:
        # A GPU sums gradients in no fixed order. AdamW's first steps turn such differences into up to a whole step.
        tolerance = 0.0 if device.type == "cpu" else 5e-3
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


def check_snapshot_served_on_cpu(device: torch.device) -> None:
    """A snapshot of weights trained on the device gives the same scores on the CPU as on the device."""
    blocks = stream(RICH_SCHEMA, batches=21, size=128)
    learner = make_learner(device)
    for block in blocks[:20]:
        learner.step(learner.prepare(block))
    state = learner.serving_state()
    assert {tensor.device.type for tensor in state.values()} == {"cpu"}
    served = ServingModel.from_state(RICH_SCHEMA, MODEL, state).score(blocks[20].ids, blocks[20].numerics)
    own = learner.step(learner.prepare(blocks[20])).scores.cpu().numpy()
    assert np.abs(served[:, 0] - own[:, 0]).mean() < (1e-5 if device.type == "cpu" else 0.02)
    on_device = ServingModel.from_state(RICH_SCHEMA, MODEL, state, device=device).score(
        blocks[20].ids, blocks[20].numerics
    )
    np.testing.assert_allclose(on_device, served, rtol=1e-3, atol=1e-3)


def check_prefetch(device: torch.device) -> None:
    """Preparing the next batch while a step runs changes no scores, even when the tables grow."""
    blocks = stream(RICH_SCHEMA, batches=12, size=128, items=4000)
    plain, ahead = make_learner(device), make_learner(device)
    expected = [plain.step(plain.prepare(block)).scores for block in blocks]
    got: list[StepResult] = []
    batch = ahead.prepare(blocks[0])
    for following in [*blocks[1:], None]:
        got.append(ahead.step(batch))
        if following is not None:
            batch = ahead.prepare(following)
    for result, scores in zip(got, expected, strict=True):
        torch.testing.assert_close(result.scores, scores, rtol=0.05, atol=0.02)


def check_choices(device: torch.device, ranker: str) -> None:
    """``choices`` returns what the next step chooses. On a GPU, near-ties may be decided otherwise."""
    blocks = stream(RICH_SCHEMA, batches=6, size=128)
    learner = make_learner(device, ranker)
    for block in blocks[:5]:
        learner.step(learner.prepare(block))
    batch = learner.prepare(blocks[5])
    choices, limits = learner.choices(blocks[5].ids, blocks[5].numerics), learner.expert_limits
    load = learner.step(batch).expert_load
    if limits is None:
        assert choices is None
        return
    assert choices is not None
    assert load is not None
    assert choices.device.type == device.type
    cells = choices.cpu() + limits.num_experts * torch.arange(RICH_SCHEMA.num_tasks).view(1, -1, 1)
    counted = torch.bincount(cells.flatten(), minlength=load.numel()).view(load.shape)
    counted[:, : limits.num_fixed] += len(blocks[5])
    moved = (counted - load.cpu()).abs().sum() / load.sum().cpu()
    assert float(moved) <= (0.0 if device.type == "cpu" else 0.01)


def check_a_broken_step(device: torch.device, ranker: str) -> None:
    """A batch with a weight of NaN changes nothing but, on a GPU, the moments of the numeric features."""
    *blocks, block = stream(RICH_SCHEMA, batches=4, size=128)
    learner = make_learner(device, ranker)
    for each in blocks:
        assert learner.step(learner.prepare(each)).taken
    weight = block.weight.copy()
    weight[3] = np.nan
    batch = learner.prepare(replace(block, weight=weight))
    before = learner.state()
    result = learner.step(batch)
    assert not result.taken
    assert learner.step_number == 3
    after = learner.state()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        if device.type == "cpu" or not ("numerics." in name or "features.moments" in name):
            assert torch.equal(after[name], tensor), name
    assert learner.step(learner.prepare(block)).taken
    assert learner.step_number == 4


def _outcome(experts: FullExperts, h_BD: Tensor, loss_of: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    h_BD = h_BD.detach().requires_grad_()
    loss = loss_of(h_BD)
    gradients = torch.autograd.grad(loss, [h_BD, *experts.parameters()])
    return dict(zip(["h", "first layer", "second layer"], gradients, strict=True)) | {"loss": loss.detach()}


def _dense(experts: FullExperts, h_BD: Tensor, routing: Routing) -> Tensor:
    outputs = []
    for e in range(8):
        y = h_BD
        for weight_E in experts.weights:
            y = y @ weight_E[e]
            y = torch.nn.functional.silu(torch.nn.functional.layer_norm(y, y.shape[1:]))
        outputs.append(y)
    weights_BRE = torch.zeros_like(routing.probs_BRL).scatter(2, routing.experts_BRK, routing.weights_BRK)
    return torch.einsum("bte,ebh->bth", weights_BRE, torch.stack(outputs))
