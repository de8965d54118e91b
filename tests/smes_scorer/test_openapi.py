"""What the scorer's OpenAPI document says of requests and answers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from smes.schema import Schema
from smes_io.secrets import SecretPlace


def schemas(make_app: Callable[..., FastAPI]) -> dict[str, Any]:
    """The named schemas of the OpenAPI document."""
    found: dict[str, Any] = make_app(max_items=5).openapi()["components"]["schemas"]
    return found


def test_openapi_shows_every_context_feature_with_type_and_description(
    make_app: Callable[..., FastAPI], schema: Schema
) -> None:
    context = schemas(make_app)["Context"]["properties"]

    types = {name: [option["type"] for option in field["anyOf"]] for name, field in context.items()}
    assert types == {
        "hour": ["integer", "string", "null"],
        "tags": ["array", "null"],
        "battery": ["number", "null"],
        "seen": ["array", "null"],
        "outcomes": ["array", "null"],
    }
    assert all(field["description"] for field in context.values())


def test_openapi_shows_the_limits_of_a_request(make_app: Callable[..., FastAPI]) -> None:
    request = schemas(make_app)["ScoreRequest"]

    assert request["required"] == ["user_id", "items"]
    assert (request["properties"]["items"]["minItems"], request["properties"]["items"]["maxItems"]) == (1, 5)
    assert request["properties"]["top_k"]["anyOf"][0]["minimum"] == 1
    assert request["properties"]["tasks"]["anyOf"][0]["items"]["enum"] == ["click", "like", "watch_s"]


def test_openapi_shows_the_tasks_of_an_answer(make_app: Callable[..., FastAPI]) -> None:
    scores = schemas(make_app)["Scores"]

    assert (list(scores["properties"]), scores["required"]) == (["click", "like", "watch_s"], [])
    assert all(task["type"] == "number" for task in scores["properties"].values())


def test_openapi_says_who_needs_a_token(make_app: Callable[..., FastAPI], tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("0123456789abcdef")
    closed = make_app(tokens=SecretPlace(file=tokens)).openapi()
    paths = {path: next(iter(methods.values())) for path, methods in closed["paths"].items()}

    closed_paths = {"/v1/score", "/v1/explain", "/v1/stats", "/metrics"}
    assert {path for path, one in paths.items() if "security" in one} == closed_paths
    assert all(("401" in one["responses"]) == ("security" in one) for one in paths.values())
    assert "securitySchemes" not in make_app().openapi()["components"]


def test_openapi_describes_every_endpoint(make_app: Callable[..., FastAPI]) -> None:
    document = make_app().openapi()

    assert set(document["paths"]) == {
        *("/v1/score", "/v1/explain", "/v1/stats", "/health/live", "/health/ready", "/metrics")
    }
    for path, answer in (("/v1/score", "/Answer"), ("/v1/explain", "/Explanation")):
        bodies = document["paths"][path]["post"]
        assert bodies["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ScoreRequest")
        assert bodies["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith(answer)
        assert answer[1:] in document["components"]["schemas"]
