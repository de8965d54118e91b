"""The alert rules by themselves: each one fires, does not fire without its cause, and is explained."""

import re
import shutil
import subprocess
from pathlib import Path

import yaml

from tests.ops.expressions import OPS, alert_rules

ROOT = OPS.parent
TESTS = sorted((OPS / "prometheus").glob("*_test.yml"))


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *map(str, arguments)], check=False, capture_output=True, text=True, timeout=60)


def test_each_rule_is_tried_with_and_without_its_cause() -> None:
    fires: set[str] = set()
    quiet: set[str] = set()
    for path in TESTS:
        for test in yaml.safe_load(path.read_text())["tests"]:
            for one in test["alert_rule_test"]:
                (fires if one["exp_alerts"] else quiet).add(one["alertname"])
    names = [rule["alert"] for rule in alert_rules()]
    assert len(names) == len(set(names)) > 40
    assert fires == quiet == set(names)


def test_every_rule_fires_and_does_not_fire(prometheus: None, tmp_path: Path) -> None:
    done = promtool("check", "config", "--lint=all", "--lint-fatal", OPS / "prometheus" / "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    done = promtool("test", "rules", *TESTS)
    assert done.returncode == 0, done.stdout + done.stderr
    # The tests can fail: with a rule that is off by its threshold they do.
    for path in (OPS / "prometheus").glob("alerts*.yml"):
        shutil.copy(path, tmp_path)
    rules = tmp_path / "alerts.yml"
    rules.write_text(rules.read_text().replace("> 1.5 * (", "> 15 * ("))
    done = promtool("test", "rules", tmp_path / "alerts_of_hours_test.yml")
    assert done.returncode == 1
    assert "alertname: SmesMemoryGrows" in done.stdout + done.stderr


def test_each_alert_says_what_to_do() -> None:
    explained = (ROOT / "docs" / "operate" / "alerts.md").read_text()
    headings = re.findall(r"^#+ (Smes\w+)$", explained, re.MULTILINE)
    rules = alert_rules()
    assert headings == [rule["alert"] for rule in rules], "in the order of the rules"
    for rule in rules:
        assert rule["labels"]["severity"] in ("critical", "warning"), rule["alert"]
        assert rule["annotations"]["runbook"] == f"docs/operate/alerts.md#{rule['alert'].lower()}"
        text = explained.partition(f" {rule['alert']}\n")[2].partition("\n#")[0]
        assert f"`{rule['labels']['severity']}`" in text, f"{rule['alert']}: its severity is not told"
        assert len(text.split()) > 20, f"{rule['alert']}: hardly explained"
