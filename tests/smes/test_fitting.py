"""A snapshot whose configuration and tensors do not fit is refused before anything of the wrong size is allocated."""

import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from smes.model.config import RANKER_NAMES, ModelConfig, OptimizerConfig, RankerName
from smes.model.fitting import OnlyAsLargeAs, check_finite, fitting_config
from smes.model.learner import Learner
from smes.model.rank_model import RankModel
from smes.model.serving import ServingModel
from smes.schema import Feature, Schema, Task

SCHEMA = Schema(
    name="fit",
    tasks=(Task("click"), Task("like")),
    features=(Feature("author", "id"), Feature("age", "numeric")),
)
Tensors = dict[str, Tensor]


def trained(ranker: RankerName = "smes") -> tuple[dict[str, Any], Tensors]:
    """The configuration and the tensors of a snapshot."""
    model = ModelConfig(ranker=ranker)
    return model.to_dict(), Learner(
        SCHEMA, model, OptimizerConfig(), device=torch.device("cpu"), seed=1
    ).serving_state()


def load(config: dict[str, Any], tensors: Tensors) -> ServingModel:
    return ServingModel.from_state(SCHEMA, ModelConfig.from_dict(fitting_config(config, tensors)), tensors)


@pytest.mark.parametrize("ranker", RANKER_NAMES)
def test_what_was_trained_is_served_with_its_own_weights(ranker: RankerName) -> None:
    config, tensors = trained(ranker)
    whole = RankModel(SCHEMA, ModelConfig(ranker=ranker))
    whole.load_state_dict({k.removeprefix("dense."): v for k, v in tensors.items() if k.startswith("dense.")})

    served = load(config, tensors)

    ids, numerics = np.arange(12).reshape(4, 3), np.ones((4, 1), np.float32)
    assert np.isfinite(served.score(ids, numerics)).all()
    with OnlyAsLargeAs(whole.state_dict()):
        again = RankModel(SCHEMA, ModelConfig(ranker=ranker))
    again.load_state_dict(whole.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.buffers(), whole.buffers(), strict=True))


def changed(**sections: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(config: dict[str, Any]) -> dict[str, Any]:
        return {k: v | sections[k] if k in sections and isinstance(v, dict) else v for k, v in config.items()} | {
            k: v for k, v in sections.items() if not isinstance(v, dict)
        }

    return change


@pytest.mark.parametrize(
    ("ranker", "change", "message"),
    [
        (
            "shared_bottom",
            changed(shared_bottom={"dims": [24_000, 24_000]}),
            r"dims\[0\]: 24000, expected at most 4096",
        ),
        ("shared_bottom", changed(shared_bottom={"dims": [4096, 4096]}), "more than the .* values of the tensors"),
        ("shared_bottom", changed(shared_bottom={"dims": [8] * 100_000}), "dims: 100000 entries, expected at most 64"),
        ("shared_bottom", changed(embedding_dim=10**12), "ModelConfig.embedding_dim: 1000000000000, expected at most"),
        ("shared_bottom", changed(head_dim=10**12), "ModelConfig.head_dim: 1000000000000"),
        ("mmoe", changed(mmoe={"num_experts": 10**9}), "ModelConfig.mmoe.num_experts: 1000000000"),
        ("ple", changed(ple={"num_levels": 4000}), "ModelConfig.ple.num_levels: 4000, expected at most"),
        ("ple", changed(ple={"num_specific": 10**9}), "ModelConfig.ple.num_specific: 1000000000"),
        ("home", changed(home={"experts_per_group": 10**9}), "ModelConfig.home.experts_per_group: 1000000000"),
        ("smes", changed(smes={"groups": {"found": 10**9}}), "ModelConfig.smes.groups.found: 1000000000"),
        ("smes", changed(smes={"experts": {"num": 2**40}}), "ModelConfig.smes.experts.num: 1099511627776"),
    ],
)
def test_a_configuration_that_asks_for_more_than_is_there_is_refused(
    ranker: RankerName, change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    config, tensors = trained(ranker)
    peak_kib, began_s = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()

    with pytest.raises(ValueError, match=message):
        load(change(config), tensors)

    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib < 100_000
    assert time.monotonic() - began_s < 60


def test_sections_of_other_rankers_do_not_matter() -> None:
    config, tensors = trained("mmoe")

    load(config | {"smes": {"groups": {"found": 10**9}}, "ple": {"num_levels": 10**9}}, tensors)


@pytest.mark.parametrize("data", [None, [], "smes", {"ranker": []}, {"ranker": "smes", "smes": 7}, {"smes": {"x": 1}}])
def test_what_is_no_configuration_is_a_value_error(data: Any) -> None:
    _, tensors = trained()

    with pytest.raises((ValueError, TypeError)):
        load(data, tensors)


def replaced(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: change(tensors[name])}


BIAS = "dense.heads.out_bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced(BIAS, lambda t: t * torch.nan), f"tensor {BIAS}: 2 values are NaN or infinite, expected numbers"),
        (replaced("table.wide", lambda t: t + torch.inf), "tensor table.wide: .* values are NaN or infinite"),
        (replaced(BIAS, lambda t: t.double()), f"tensor {BIAS.removeprefix('dense.')}: torch.float64, expected"),
        (
            replaced("table.embedding", lambda t: t.long()),
            "tensor table.embedding: torch.int64, expected torch.float32",
        ),
        (replaced("table.embedding", lambda t: t[:, :-1]), "tensor table.embedding: shape"),
        (replaced("table.keys", lambda t: t.double()), "tensor table.keys: torch.float64"),
        (replaced("table.keys", lambda t: t.reshape(1, -1)), "tensor table.keys: torch.int64"),
        (replaced("table.keys", lambda t: t[:0]), "keys of an id table"),
        (replaced("table.keys", lambda t: torch.cat([t, t])), "occur twice"),
        (replaced(BIAS, lambda t: t[:1]), "size mismatch for heads.out_bias"),
        (lambda tensors: {k: v for k, v in tensors.items() if k != BIAS}, "Missing key"),
        (lambda tensors: tensors | {"dense.more": torch.ones(1)}, "Unexpected key"),
        (lambda tensors: tensors | {BIAS: torch.empty(0, 2**60)}, "size mismatch"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: Callable[[Tensors], Tensors], message: str) -> None:
    config, tensors = trained()

    with pytest.raises(ValueError, match=message):
        load(config, change(tensors))


def test_large_finite_numbers_are_numbers() -> None:
    check_finite("x", torch.full((3,), torch.finfo(torch.float32).max))
