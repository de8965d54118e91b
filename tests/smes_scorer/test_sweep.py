"""Requests of all kinds, made by schemathesis from the scorer's own OpenAPI document: no 500, no hang."""

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import pytest
import redis
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from feature_store.snapshots import SnapshotStore
from smes_io.secrets import SecretPlace

TOKEN = "a-token-of-the-sweep"
LONGEST_S = 30.0  # of an answer
DOCUMENTED = {
    "/v1/score": {200, 400, 408, 413, 422},  # nothing here makes it busy, and it is ready
    "/v1/explain": {200, 400, 408, 413, 422},
    "/v1/stats": {200},
    "/metrics": {200},
    "/health/live": {200},
    "/health/ready": {200},
}
UNFIT = [
    # 1.0 is an integer in JSON Schema, but not here; and the document cannot say that one list is as long as another.
    positive_data_acceptance,
]


LIMITS = settings(database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))


def sweep(url: str, cases: int, headers: dict[str, str]) -> Counter[tuple[str, int]]:
    """Send so many requests and check every answer; how many there were of each path and status.

    So many are for scoring, half of which follow the document and half of which break it, and a fifth as many for
    explaining. The other paths have a few.
    """
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=headers)
    operations: list[Any] = [cast(Any, found).ok() for found in schema.get_all_operations()]
    assert {operation.path for operation in operations} == set(DOCUMENTED)
    seen: Counter[tuple[str, int]] = Counter()

    def check(case: Any) -> None:
        answer = case.call(headers=dict(headers), timeout=LONGEST_S)
        seen[case.operation.path, answer.status_code] += 1
        known = answer.request.headers.get("Authorization") == headers["Authorization"]  # some cases leave it out
        expected = DOCUMENTED[case.operation.path] if known or case.operation.path.startswith("/health/") else {401}
        assert answer.status_code in expected, (case.as_curl_command(), answer.content)
        case.validate_response(answer, excluded_checks=UNFIT, headers=dict(headers))

    for operation in operations:
        cases_of = {"/v1/score": -(-cases // 2), "/v1/explain": cases // 10}.get(operation.path)
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE) if cases_of else (GenerationMode.POSITIVE,):
            some: Any = settings(LIMITS, max_examples=cases_of or 10)  # hypothesis types decorators
            same: Any = seed(12)
            made: Any = given(operation.as_strategy(generation_mode=mode))
            same(some(made(check)))()
    return seen


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("cases", [150, pytest.param(2000, marks=pytest.mark.soak)])
def test_every_request_has_a_documented_answer(
    make_app: Callable[..., FastAPI],
    listening: Callable[[FastAPI], AbstractContextManager[str]],
    client: redis.Redis,
    namespace: str,
    publish: Callable[..., object],
    until: Callable[[Callable[[], object]], None],
    tmp_path: Path,
    cases: int,
) -> None:
    publish(SnapshotStore(client, namespace), 1)
    tokens = tmp_path / "tokens"
    tokens.write_text(TOKEN)
    app = make_app(tokens=SecretPlace(file=tokens))
    with listening(app) as url:
        until(lambda: app.state.telemetry.summary()["swaps"] > 0)
        seen = sweep(url, cases, {"Authorization": f"Bearer {TOKEN}"})

    scored = {status for (path, status), count in seen.items() if path == "/v1/score"}
    assert {status for path, status in seen if path == "/v1/explain"} >= {200, 422}
    assert sum(count for (path, _), count in seen.items() if path == "/v1/score") >= cases
    assert {200, 401, 422} <= scored  # both sides of the document were tried
    assert {path for path, _ in seen} == set(DOCUMENTED)
