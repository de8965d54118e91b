"""The three stages: what holds for every instance; the paper's two stages bit for bit.

Letters as in smes.rankers.sparse.routing, with a router per task.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smes.rankers.sparse.config import SmesConfig
from smes.rankers.sparse.packing import dispatch
from smes.rankers.sparse.routing import Routing, Selection
from tests.smes.naive_routing import bound, chosen, pool_of
from tests.smes.plain_smes import plain


@st.composite
def _shapes(draw: st.DrawFn) -> tuple[SmesConfig, tuple[int, ...]]:
    """Any configuration of stages that is not refused, and the groups of its tasks."""
    named = draw(st.lists(st.integers(0, 3), min_size=1, max_size=7))
    groups = tuple(sorted(set(named)).index(g) for g in named)
    G = len(set(groups))
    own, always_on = draw(st.booleans()), draw(st.booleans())
    group, adaptive = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    shared = draw(st.integers(0, 3)) if always_on or not own else 0
    if group + adaptive + (0 if always_on else shared) == 0:
        group = 1
    pools = G if own else 1
    needed = group + adaptive + (0 if always_on else shared)
    size = draw(st.integers(needed, needed + 9))
    fixed = shared if always_on else 0
    least = fixed + pools * needed
    budget = draw(st.none() | st.integers(least, least + 12))
    config = plain(
        {
            "experts.num": fixed + pools * size,
            "num_shared": shared,
            "num_group": group,
            "num_adaptive": adaptive,
            "groups.pools": "own" if own else "common",
            "shared_experts": "always_on" if always_on else "routed",
            "max_active": budget,
        }
    )
    return config, groups


def _select(config: SmesConfig, groups: Sequence[int], z_BRC: Tensor) -> Routing:
    R = len(groups)
    routing: Routing = Selection(config.stages(tuple(groups)), torch.full((R,), 1 / R))(z_BRC)
    return routing


def _logits(config: SmesConfig, groups: Sequence[int], B: int, levels: int, seed: int) -> Tensor:
    """Few levels make many ties, one makes them all equal."""
    columns = config.stages(tuple(groups)).columns
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, levels, (B, len(groups), columns), generator=generator).float() / 2


@settings(max_examples=300, deadline=None)
@given(_shapes(), st.sampled_from([1, 2, 5, 10_000]), st.booleans(), st.integers(0, 2**31))
def test_whatever_the_stages_pools_and_budget(
    shape: tuple[SmesConfig, tuple[int, ...]], levels: int, trim: bool, seed: int
) -> None:
    config, groups = shape
    routing = _select(config, groups, _logits(config, groups, 6, levels, seed))
    K = config.num_shared + config.num_group + config.num_adaptive
    common = config.num_shared
    fixed = set(range(config.num_shared)) if config.shared_experts == "always_on" else set()
    assert routing.experts_BRK.shape == (6, len(groups), K)
    torch.testing.assert_close(routing.weights_BRK.sum(-1), torch.ones(6, len(groups)))
    assert routing.bound <= bound(config, groups)
    active_B = dispatch(routing, trim=trim).active_B.tolist()
    for b, experts_TK in enumerate(routing.experts_BRK.tolist()):
        of_group: dict[int, list[int]] = {}
        for t, experts in enumerate(experts_TK):
            assert len(set(experts)) == K, "a task's experts are distinct"
            assert experts[:common] == experts_TK[0][:common], "stage I is the same for all tasks"
            stage_two = experts[common : common + config.num_group]
            assert stage_two == of_group.setdefault(groups[t], stage_two), "stage II is the same within a group"
            assert set(experts) <= fixed | set(pool_of(config, groups, groups[t])), "no pool but the group's own"
        if fixed:
            assert set(experts_TK[0][:common]) == fixed
        union = {e for experts in experts_TK for e in experts}
        assert len(union) == active_B[b] <= routing.bound
        assert config.max_active is None or len(union) <= config.max_active


@settings(max_examples=150, deadline=None)
@given(_shapes(), st.integers(0, 2**31))
def test_without_ties_every_stage_takes_the_best(shape: tuple[SmesConfig, tuple[int, ...]], seed: int) -> None:
    config, groups = shape
    columns = config.stages(groups).columns
    # Permutations of well-separated logits: no two experts can be as good for a task, or (nearly) for a group.
    generator = torch.Generator().manual_seed(seed)
    z_BRC = torch.randn(3, len(groups), columns, generator=generator) * 2
    routing = _select(config, groups, z_BRC)
    fixed = config.num_shared if config.shared_experts == "always_on" else 0
    for b in range(3):
        z = []
        for t, g in enumerate(groups):
            experts = [*range(fixed), *pool_of(config, groups, g)]
            z.append(dict(zip(experts, z_BRC[b, t].tolist(), strict=True)))
        expected = chosen(config, groups, z)
        assert routing.experts_BRK[b].tolist() == expected
        for t, experts in enumerate(expected):
            powers = torch.tensor([z[t][e] for e in experts], dtype=torch.float64).exp()
            torch.testing.assert_close(routing.weights_BRK[b, t], (powers / powers.sum()).float())


def _first(values: Tensor, count: int) -> Tensor:
    """TopK that takes the first of equal values."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _two_stages(
    z_BRE: Tensor, weights_R: Tensor, shared: int, adaptive: int, budget: int | None
) -> tuple[Tensor, Tensor]:
    """The paper's two stages as they were before there was a third: (experts, weights)."""
    B, R, E = z_BRE.shape
    probs_BRE = z_BRE.softmax(dim=-1)
    demand_BE = torch.einsum("bte,t->be", probs_BRE, weights_R)
    shared_BS = _first(demand_BE, shared)
    taken_BE = torch.zeros(B, E, dtype=torch.bool).scatter_(1, shared_BS, True)
    rest_BRE = z_BRE.masked_fill(taken_BE.unsqueeze(1), float("-inf"))
    if budget is not None and budget < min(shared + R * adaptive, E):
        unmet_BE = probs_BRE.amax(dim=1).scatter(1, shared_BS, -1.0)
        open_BP = _first(unmet_BE, budget - shared)
        closed_BE = torch.ones(B, E, dtype=torch.bool).scatter_(1, open_BP, False)
        rest_BRE = rest_BRE.masked_fill(closed_BE.unsqueeze(1), float("-inf"))
    own_BTA = _first(rest_BRE, adaptive)
    experts_BRK = torch.cat([shared_BS.unsqueeze(1).expand(B, R, shared), own_BTA], dim=-1)
    return experts_BRK, z_BRE.gather(-1, experts_BRK).softmax(dim=-1)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=6),
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.none() | st.integers(6, 9)),
    st.sampled_from([1, 3, 10_000]),
    st.integers(0, 2**31),
)
def test_without_a_group_stage_it_is_the_two_stages(
    named: list[int], counts: tuple[int, int, int | None], levels: int, seed: int
) -> None:
    shared, adaptive, budget = counts
    if shared + adaptive == 0:
        adaptive = 1
    groups = [sorted(set(named)).index(g) for g in named]
    config = plain({"experts.num": 12, "num_shared": shared, "num_adaptive": adaptive, "max_active": budget})
    z_BRE = _logits(config, groups, 7, levels, seed)
    weights_R = torch.full((len(groups),), 1 / len(groups))
    routing = _select(config, groups, z_BRE)
    experts_BRK, weights_BRK = _two_stages(z_BRE, weights_R, shared, adaptive, budget)
    assert torch.equal(routing.experts_BRK, experts_BRK)
    torch.testing.assert_close(routing.weights_BRK, weights_BRK, rtol=1e-6, atol=1e-7)


def test_a_budget_leaves_groups_alone_that_cannot_exceed_their_share() -> None:
    """Two tasks want at most 3 of their group's 5, their share of 6; four tasks of the other group could want all 5."""
    groups = (0, 0, 1, 1, 1, 1)
    shape = {"experts.num": 10, "num_shared": 0, "num_group": 1, "num_adaptive": 1, "groups.pools": "own"}
    config = plain({**shape, "max_active": 6})
    # The group's choice is expert 4 of its part, with the best mean; by their highest share, three others come first.
    first, second = [0.40, 0.33, 0.01, 0.02, 0.24], [0.01, 0.02, 0.40, 0.33, 0.24]
    z_BRC = torch.tensor([[first, second, *([0.1, 0.2, 0.3, 0.35, 0.05],) * 4]]).log()
    free = _select(plain(shape), groups, z_BRC)
    assert free.experts_BRK[0, :2].tolist() == [[4, 0], [4, 2]]
    assert torch.equal(_select(config, groups, z_BRC).experts_BRK[:, :2], free.experts_BRK[:, :2])


@pytest.mark.parametrize(
    ("config", "groups", "expected"),
    [
        ({"num_shared": 2, "num_group": 1, "num_adaptive": 1}, (0, 0, 1, 1, 1), 2 + 2 * 1 + 5 * 1),
        ({"num_shared": 2, "num_group": 4, "num_adaptive": 2, "experts.num": 12}, (0, 1, 2, 2), 12),
        ({"num_shared": 0, "num_group": 1, "num_adaptive": 2, "groups.pools": "own"}, (0, 0, 0, 1), 1 + 3 * 2 + 1 + 2),
        (
            # a part has 6 experts: the first group's 7 do not fit
            {"num_shared": 0, "num_group": 1, "num_adaptive": 2, "groups.pools": "own", "experts.num": 12},
            (0, 0, 0, 1),
            6 + 3,
        ),
        (
            # 10 for two parts, 5 each: the first group wants 7, the second 3
            {"num_shared": 0, "num_group": 1, "num_adaptive": 2, "groups.pools": "own", "max_active": 9},
            (0, 0, 0, 1),
            4 + 3,
        ),
        ({"num_shared": 2, "shared_experts": "always_on", "num_group": 1, "max_active": 7}, (0, 0, 0, 1, 2, 3), 7),
    ],
)
def test_the_bound(config: dict[str, Any], groups: tuple[int, ...], expected: int) -> None:
    assert plain(config).stages(groups).bound == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"experts.num": 16, "num_shared": 0},
            r"SmesConfig\.experts\.num: 16 to choose from, .*a multiple of .*groups \(3\).* set experts\.num to 15",
        ),
        (
            {"experts.num": 6, "num_shared": 0, "num_group": 2},
            "at least 3 for each, for own pools: set experts.num to 9",
        ),
        (
            {"experts.num": 17, "num_shared": 2, "shared_experts": "always_on", "num_group": 1, "max_active": 7},
            "max_active: 7, expected null or at least num_group \\+ num_adaptive for each of 3 own pools.*\\(8\\)",
        ),
    ],
)
def test_what_does_not_fit_the_groups_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plain({"groups.pools": "own", **config}).stages((0, 1, 2))
