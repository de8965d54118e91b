"""Which configurations of the scorer are refused, and what its defaults mean."""

from collections.abc import Callable

import pytest
from fastapi import FastAPI

from smes.schema import Schema
from smes_scorer.config import ScorerConfig, SkewConfig, check_names, fusion_weights


def test_an_unknown_task_in_the_fusion_weights_is_named(make_app: Callable[..., FastAPI]) -> None:
    message = r"scorer\.fusion_weights: 'clik', expected one of the tasks click, like, watch_s"

    with pytest.raises(ValueError, match=message):
        make_app(fusion_weights={"clik": 1.0})


def test_default_fusion_weights(schema: Schema) -> None:
    assert fusion_weights(ScorerConfig(), schema).tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_items": 0}, "ScorerConfig.max_items: 0, expected at least 1"),
        ({"poll_s": 0.0}, "ScorerConfig.poll_s: 0.0, expected more than 0"),
        ({"port": 70_000}, "ScorerConfig.port: 70000, expected at least 0, at most 65535"),
        ({"fusion_weights": {"click": float("inf")}}, "ScorerConfig.fusion_weights.click: inf, expected a finite"),
    ],
)
def test_config_is_checked(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScorerConfig(**config)  # type: ignore[arg-type]  # wrong on purpose


def test_a_feature_that_is_to_be_ignored_must_be_there(schema: Schema) -> None:
    check_names(ScorerConfig(skew=SkewConfig(ignored=("age",))), schema)
    with pytest.raises(ValueError, match=r"scorer.skew.ignored: 'agee', expected one of the features user_id, item_id"):
        check_names(ScorerConfig(skew=SkewConfig(ignored=("age", "agee"))), schema)
