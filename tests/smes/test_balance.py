"""Balance losses against formulas written as loops and scikit-learn. Letters as in smes.rankers.sparse.routing."""

import pytest
import torch
from sklearn.metrics import mutual_info_score
from torch import Tensor

from smes.rankers.sparse.router import global_loss, mutual_information_loss, per_gate_loss
from smes.rankers.sparse.routing import Routing, expert_load, route


def _routing(B: int = 40, R: int = 3, E: int = 6, scale: float = 2.0) -> Routing:
    z_BRE = torch.randn(B, R, E, generator=torch.Generator().manual_seed(0))
    z_BRE = z_BRE + scale * torch.randn(R, E, generator=torch.Generator().manual_seed(1))
    return route(z_BRE, torch.full((R,), 1 / R), 1, 1)


def _taken(routing: Routing) -> tuple[Tensor, Tensor]:
    """Traffic and mean probabilities, as the losses take them."""
    B, _, K = routing.experts_BRK.shape
    return expert_load(routing.experts_BRK, routing.num_experts) / (B * K), routing.mean_RL


def test_an_even_load_has_balance_loss_one() -> None:
    # Instance b uses experts b and b+1: every expert is used by a share K/E, and the mean probability is uniform.
    E = 6
    experts_BRK = torch.stack([torch.arange(E), (torch.arange(E) + 1) % E], dim=1).unsqueeze(1).expand(E, 2, 2)
    routing = Routing(
        experts_BRK, torch.full((E, 2, 2), 0.5), torch.full((E, 2, E), 1 / E), torch.full((2, E), 1 / E), E, 4
    )
    assert global_loss(*_taken(routing)).item() == pytest.approx(1.0)


def test_a_skewed_load_costs_more_and_the_gradient_lowers_it() -> None:
    z_BRE = torch.zeros(32, 2, 8)
    z_BRE[..., 3] = 2.0
    z_BRE.requires_grad_()
    loss = global_loss(*_taken(route(z_BRE, torch.full((2,), 0.5), 0, 1)))
    p3 = float(torch.softmax(z_BRE.detach(), -1)[0, 0, 3])
    assert loss.item() == pytest.approx(8 * p3)  # f̄ is 1 on expert 3 and 0 elsewhere, K = 1
    loss.backward()  # type: ignore[no-untyped-call]  # torch ships no type for it
    assert z_BRE.grad is not None
    assert (z_BRE.grad[..., 3] > 0).all()


def test_per_gate_is_the_mean_over_the_tasks_of_their_own_loss() -> None:
    routing = _routing()
    B, R, K = routing.experts_BRK.shape
    total = 0.0
    for r in range(R):
        for e in range(6):
            used = sum(e in routing.experts_BRK[b, r].tolist() for b in range(B)) / B
            total += 6 / K * used * sum(float(routing.probs_BRL[b, r, e]) for b in range(B)) / B / R
    assert float(per_gate_loss(*_taken(routing))) == pytest.approx(total, rel=1e-5)


def test_tasks_with_experts_of_their_own_are_even_together_but_not_each() -> None:
    E = 4
    experts_BRK = torch.arange(E).view(1, E, 1).expand(5, E, 1)  # task r uses expert r, always
    routing = Routing(experts_BRK, torch.ones(5, E, 1), torch.eye(E).expand(5, E, E), torch.eye(E), E, E)
    assert float(per_gate_loss(*_taken(routing))) == pytest.approx(E)
    loss = mutual_information_loss(*_taken(routing))
    assert float(loss) == pytest.approx(-torch.tensor(4.0).log().item()), "the expert says all about the task"


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_mutual_information_against_scikit_learn(scale: float) -> None:
    routing = _routing(scale=scale)
    # scikit-learn counts: the mean probabilities in millionths.
    counts_TE = (routing.probs_BRL.double().mean(dim=0) * 1e6).round().long().numpy()
    expected = -mutual_info_score(None, None, contingency=counts_TE)
    loss = mutual_information_loss(*_taken(routing))
    assert float(loss) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_mutual_information_has_a_gradient_where_probabilities_underflow() -> None:
    z_BRE = torch.zeros(4, 2, 3)
    z_BRE[..., 0] = 300.0  # the others' probabilities are 0 in float32
    z_BRE[:, 1, 1] = 299.0
    z_BRE.requires_grad_()
    routing = route(z_BRE, torch.full((2,), 0.5), 0, 1)
    assert float(routing.probs_BRL.min()) == 0
    mutual_information_loss(*_taken(routing)).backward()  # type: ignore[no-untyped-call]  # torch ships no type for it
    assert z_BRE.grad is not None
    assert torch.isfinite(z_BRE.grad).all()
    assert float(z_BRE.grad.abs().max()) > 0


def test_descending_spreads_the_experts_and_parts_the_tasks() -> None:
    """One step down: the information grows, whatever the start."""
    z_BRE = torch.randn(30, 3, 6, generator=torch.Generator().manual_seed(5)).requires_grad_()
    weights_R = torch.full((3,), 1 / 3)
    routing = route(z_BRE, weights_R, 1, 1)
    first = mutual_information_loss(*_taken(routing))
    (gradient,) = torch.autograd.grad(first, z_BRE)
    routing = route(z_BRE.detach() - 10 * gradient, weights_R, 1, 1)
    assert float(mutual_information_loss(*_taken(routing))) < float(first.detach())
