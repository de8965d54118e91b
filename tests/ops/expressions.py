"""What the alert rules and the dashboards ask Prometheus."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

OPS = Path(__file__).resolve().parent.parent.parent / "ops"
RULES = OPS / "prometheus" / "alerts.yml"
DASHBOARDS = sorted((OPS / "grafana" / "dashboards").glob("*.json"))

_SELECTOR = re.compile(r"\b((?:smes_trainer|smes_scorer|process)_\w+|up|ALERTS)\b(\{[^}]*\})?")
_VARIABLES = {"$job": ".+", "$instance": ".+", "$task": ".+"}


def alert_rules() -> list[dict[str, Any]]:
    """All alert rules."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def panels(dashboard: Path) -> list[dict[str, Any]]:
    """The panels of a dashboard, rows left out."""
    return [panel for panel in json.loads(dashboard.read_text())["panels"] if panel["type"] != "row"]


def dashboard_queries() -> Iterator[tuple[str, str]]:
    """(Dashboard and panel, expression) of every query."""
    for dashboard in DASHBOARDS:
        for panel in panels(dashboard):
            for target in panel["targets"]:
                yield f"{dashboard.name}: {panel['title']}", target["expr"]


def selectors(expression: str) -> list[tuple[str, str]]:
    """(Metric, the same with its label matchers) of everything that an expression selects."""
    quoted = re.sub(r'"[^"]*"', lambda found: found[0].replace("}", "\0"), expression)
    return [(found[1], found[0].replace("\0", "}")) for found in _SELECTOR.finditer(quoted)]


def with_all(expression: str, interval: str) -> str:
    """A dashboard's expression as Grafana asks it when everything is chosen."""
    for variable, value in _VARIABLES.items():
        expression = expression.replace(variable, value)
    return expression.replace("$__rate_interval", interval)
