"""A real Prometheus scrapes a real ``smes train`` and ``smes serve``, and alerts when something really goes wrong.

Guarantees shown: every rule and every panel asks for something that is there; where all is well nothing alerts; what
goes wrong does; the documentation names the metrics that there are, and no others.
"""

import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client import CollectorRegistry

from simulators.synthetic import synthesize
from smes_cli.__main__ import run
from smes_cli.demo.processes import log_tail
from smes_scorer.arm_telemetry import ArmTelemetry
from stream.log.event_log import OutRecord
from stream.log.open_log import open_event_log
from stream.topics import IMPRESSIONS
from tests.integration.training import fill_servers, read_pairs, totals
from tests.ops.expressions import OPS, alert_rules, dashboard_queries, selectors, with_all
from tests.ops.real_prometheus import Prometheus, prometheus_for
from tests.running import read_config, start_smes, stop_started, until, valkey_server, write_config

TOKEN = "a-token-of-this-test"
ABSENT = {
    "ALERTS": "nothing alerts",
    "smes_scorer_skew_total": "no hour was compared",
    "smes_scorer_skew_size": "no hour was compared",
    "smes_scorer_arm_fallbacks_total": "the only arm is a shadow",
    "smes_scorer_arm_score_difference_bucket": "the shadow has no version",
    "smes_scorer_arm_score_shift": "the shadow has no version",
    "smes_scorer_arm_shadow_latency_seconds_bucket": "the shadow has no version",
}
"""Metrics that this run cannot have, and why."""
METRICS = OPS.parent / "docs" / "reference" / "metrics.md"


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(socket.socket())) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def everything_asked() -> list[str]:
    """What rules and panels ask for, and can be there."""
    panels = [with_all(expression, "60s") for _, expression in dashboard_queries()]
    rules = [selector for rule in alert_rules() for _, selector in selectors(rule["expr"])]
    asked = dict.fromkeys([*panels, *rules])
    return [one for one in asked if not {metric for metric, _ in selectors(one)} & ABSENT.keys()]


def read(server: Prometheus) -> float:
    """Impressions that the trainer has read."""
    [series] = server.query("smes_trainer_impressions_read_total")
    return float(series["value"][1])


def is_healthy_to_compose(port: int) -> bool:
    """What the trainer's health check of docker-compose.yml says of one on another port."""
    *_, code = yaml.safe_load((OPS.parent / "docker-compose.yml").read_text())["services"]["trainer"]["healthcheck"][
        "test"
    ]
    assert ":8001/" in code
    return subprocess.run([sys.executable, "-c", code.replace(":8001/", f":{port}/")], check=False).returncode == 0


def documented_metrics_are_those_there_are(server: Prometheus) -> None:
    """Both ways, with their kinds. What this run cannot have is known from the code."""
    there = {name: about[0]["type"] for name, about in server.get("metadata").items() if name.startswith("smes_")}
    arms = CollectorRegistry()
    ArmTelemetry(arms)
    for family in arms.collect():
        there[f"{family.name}_total" if family.type == "counter" else family.name] = family.type
    there = {name: kind for name, kind in there.items() if not name.endswith("_created")}
    named = documented(METRICS.read_text())

    assert len(there) > 90
    wrong = [f"{name} ({kind})" for name, kind in named.items() if not fits(name, kind, there)]
    assert wrong == [], "documented, but not there"
    assert [name for name in there if not any(stands_for(one, name) for one in named)] == [], "not documented"
    asked = {metric for _, expression in dashboard_queries() for metric, _ in selectors(expression)}
    asked |= {metric for rule in alert_rules() for metric, _ in selectors(rule["expr"])}
    families = {re.sub("_(bucket|sum|count)$", "", metric) for metric in asked if metric.startswith("smes_")}
    assert families <= there.keys(), "asked for, but not there"


def documented(text: str) -> dict[str, str]:
    """Name as it is written → kind, of the tables' rows; ``…`` stands for the beginning of a name before it."""
    named: dict[str, str] = {}
    for names, kind in re.findall(r"^\| (`(?:smes_|…)[^|]+) \| (\w*) ?\|", text, re.MULTILINE):
        named |= {name.partition("{")[0]: kind for name in re.findall(r"`([^`]+)`", names)}
    return named


def stands_for(written: str, name: str) -> bool:
    return bool(re.fullmatch(written.replace("…", "smes_.*").replace("FIGURE", ".+"), name))


def fits(written: str, kind: str, there: Mapping[str, str]) -> bool:
    kinds = {there[name] for name in there if stands_for(written, name)}
    return bool(kinds) and (not kind or kinds == {kind})


@pytest.fixture(autouse=True)
def _nothing_left_running() -> Iterator[None]:
    yield
    stop_started()


@pytest.mark.timeout(300)
def test_what_is_asked_is_there_and_what_goes_wrong_alerts(prometheus: None, namespace: str, tmp_path: Path) -> None:
    world, token = tmp_path / "world.parquet", tmp_path / "token"
    synthesize(world, 3000, seed=5)
    token.write_text(TOKEN)
    ports = dict(zip(("trainer", "scorer"), free_ports(2), strict=True))
    targets = {f"smes-{name}": f"127.0.0.1:{port}" for name, port in ports.items()}
    with ExitStack() as stack:
        server = stack.enter_context(prometheus_for(tmp_path / "prometheus", targets, token))
        events_run, store_run = stack.enter_context(ExitStack()), stack.enter_context(ExitStack())
        events, store = events_run.enter_context(valkey_server()), store_run.enter_context(valkey_server())
        secret = {"file": str(token)}
        path = write_config(
            tmp_path / "run",
            store.connection_url,
            namespace,
            event_log={"redis_url": events.connection_url},
            stream={"batch": {"size": 8}},
            trainer={
                "http": {"port": ports["trainer"], "tokens": secret},
                "gate": {"enabled": True},
                "snapshot_interval_s": 0.5,
                "checkpoint": {"interval_s": 1.0},
            },
            scorer={
                "port": ports["scorer"],
                "tokens": secret,
                "arms": {"candidate": {"held": True, "shadow": True}},
            },
        )
        config = read_config(path)
        assert run(["-q", "-c", str(path), "features", "load", str(world)]) == 0
        pairs = read_pairs(config, world)
        first, rest = pairs[: len(pairs) * 2 // 3], pairs[len(pairs) * 2 // 3 :]
        fill_servers(config, [], "json")  # the topics
        until(lambda: server.firing() == {"SmesTrainerDown", "SmesScorerDown"}, "alerts of what has not begun")
        log = tmp_path / "train.log"
        trainer = start_smes(log, "-c", str(path), "train")
        start_smes(tmp_path / "serve.log", "-c", str(path), "serve")
        url, headers = f"http://{targets['smes-scorer']}", {"authorization": f"Bearer {TOKEN}"}
        http = stack.enter_context(httpx.Client(base_url=url, headers=headers))

        until(lambda: len(server.query("up == 1")) == 2, "both scraped")
        fill_servers(config, first, "json")

        pending = everything_asked()

        def all_there() -> bool:
            """Whether every query has had series: while this is asked, requests are made."""
            assert trainer.poll() is None, log_tail(log, 40)
            if http.get("/health/ready").status_code == 200:
                http.post("/v1/score", json={"user_id": 7, "items": [1, 2, 3]}).raise_for_status()
            while pending and server.query(pending[-1]):
                pending.pop()
            return not pending

        try:
            until(all_there)
        except AssertionError:
            pytest.fail(f"no series: {pending}")
        until(lambda: not server.firing(), "an end of all alerts")
        assert {rule["health"] for group in server.get("rules")["groups"] for rule in group["rules"]} == {"ok"}
        assert len(server.query("count by (job) (up == 1)")) == 2
        assert is_healthy_to_compose(ports["trainer"])
        documented_metrics_are_those_there_are(server)

        with closing(open_event_log(config.event_log)) as log_of_events:
            log_of_events.append(IMPRESSIONS, [OutRecord(b"no impression", (), 0)])
        until(lambda: "SmesDeadLetters" in server.firing(), "an alert of a dead letter")

        store_run.close()
        fill_servers(config, rest, "json")
        impressions = totals(first)[0] + totals(rest)[0] + 1
        until(lambda: read(server) >= impressions, "everything read")
        events_run.close()
        away = {"SmesPublicationFails", "SmesScorerDegraded", "SmesTrainerDegraded"}
        until(lambda: away <= server.firing(), "alerts of servers that are away")
        trainer.kill()
        until(lambda: {"SmesTrainerDown", "SmesScorerDegraded"} <= server.firing(), "an alert of a killed trainer")
        assert "SmesScorerDown" not in server.firing()
        assert not is_healthy_to_compose(ports["trainer"])
