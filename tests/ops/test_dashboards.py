"""The dashboards without Grafana: its own types, and the rules of its own linter."""

import json
import re
from pathlib import Path
from typing import Any

import grafana_foundation_sdk.cog.plugins as grafana_plugins
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import Dashboard

from ops.grafana.make_dashboards import BOARDS, file_of, text_of
from tests.ops.expressions import DASHBOARDS, OPS, panels, selectors

UNITS = {value for name, value in vars(units).items() if not name.startswith("_") and isinstance(value, str)}


def read(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text())
    assert isinstance(value, dict)
    return value


def test_each_file_is_what_its_maker_makes() -> None:
    assert [file_of(board) for board in BOARDS] != []
    assert sorted(map(file_of, BOARDS)) == DASHBOARDS
    for board in BOARDS:
        assert file_of(board).read_text() == text_of(board), "run: python -P -m ops.grafana.make_dashboards"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_grafanas_types_hold_all_of_it(path: Path) -> None:
    grafana_plugins.register_default_plugins()
    there = read(path)

    back = json.loads(json.dumps(Dashboard.from_json(there), cls=JSONEncoder))

    assert back == there
    wrong = {**there, "panels": [{**there["panels"][1], "collapsible": True}]}
    assert json.loads(json.dumps(Dashboard.from_json(wrong), cls=JSONEncoder)) != wrong, "what is no field is lost"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_what_grafanas_linter_asks_for(path: Path) -> None:
    """The rules of github.com/grafana/dashboard-linter that are about Prometheus."""
    board = read(path)
    assert board["editable"] is False
    source, *variables = board["templating"]["list"]
    assert (source["name"], source["type"], source["query"], source["label"]) == (
        "datasource",
        "datasource",
        "prometheus",
        "Data source",
    )
    assert [variable["name"] for variable in variables[:2]] == ["job", "instance"]
    for variable in variables:
        assert variable["datasource"]["uid"] == "${datasource}"
        assert (variable["multi"], variable["includeAll"], variable["allValue"]) == (True, True, ".+")
        assert variable["refresh"] == 2, "when the time range changes"
        assert variable["label"].lower() == variable["name"]
    names, ids = {variable["name"] for variable in variables}, [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    for panel in panels(path):
        assert panel["title"], panel["id"]
        assert panel["description"], panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            expression = target["expr"]
            assert target["datasource"]["uid"] == "${datasource}"
            assert set(re.findall(r"\$(\w+)", expression)) <= names | {"__rate_interval"}, expression
            for metric, selector in selectors(expression):
                assert 'job=~"$job", instance=~"$instance"' in selector, expression
                if metric.endswith(("_total", "_bucket", "_count", "_sum")):
                    assert re.search(rf"\b(rate|increase)\({re.escape(selector)}\[\$__rate_interval\]", expression)


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_fill_the_grid_and_do_not_cover_each_other(path: Path) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in read(path)["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
    lines = {y for _, y in taken}
    assert len(taken) == 24 * len(lines), "a hole"


def test_grafana_finds_source_and_dashboards_where_compose_puts_them() -> None:
    compose = yaml.safe_load((OPS.parent / "docker-compose.yml").read_text())["services"]
    provisioning = OPS / "grafana" / "provisioning"
    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert (source["type"], source["isDefault"]) == ("prometheus", True)
    [provider] = yaml.safe_load((provisioning / "dashboards" / "smes.yml").read_text())["providers"]
    mounts = dict(volume.split(":")[:2] for volume in compose["grafana"]["volumes"])
    assert mounts["./ops/grafana/provisioning"] == "/etc/grafana/provisioning"
    assert mounts["./ops/grafana/dashboards"] == provider["options"]["path"]
    home = compose["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(home).name in [path.name for path in DASHBOARDS]
    scraped = yaml.safe_load((OPS / "prometheus" / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == scraped["global"]["scrape_interval"]
    ports = {"trainer": "SMES_TRAINER__HTTP__PORT", "scorer": "SMES_SCORER__PORT"}
    for job in scraped["scrape_configs"]:
        service = job["job_name"].removeprefix("smes-")
        assert job["static_configs"] == [{"targets": [f"{service}:{compose[service]['environment'][ports[service]]}"]}]
