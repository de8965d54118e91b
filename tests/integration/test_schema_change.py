"""Features and tasks come, go and get other names, on a real server: a checkpoint, its events and its audit."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from smes.schema import Feature, Schema, Task
from smes_cli.__main__ import run
from smes_cli.config import Config
from smes_cli.schema_changes import change_to_present
from smes_cli.train import run_train
from smes_io.schema_file import load_builtin
from tests.integration.training import Pairs, drain, fill_servers, read_pairs, snapshots_of
from tests.running import read_config, write_config
from trainer.report import conservation_errors

WAS = load_builtin("synthetic").schema
RENAMED = {"features": {"tab_shown": "tab"}, "tasks": {"loved": "like"}}


def schema_now() -> dict[str, Any]:
    """A schema file: the synthetic one with a task and two features more, one of each renamed and one of each less."""
    features = [f for f in WAS.features if f.name not in ("device", "tab")]
    tasks = [replace(t, name="loved") if t.name == "like" else t for t in WAS.tasks if t.name != "comment"]
    now = Schema(
        "synthetic",
        (Task("share", window_s=5), *tasks),
        (*features, Feature("tab_shown"), Feature("slot"), Feature("weather", "numeric")),
    )
    assert now.features[0].name == "user_id"
    return {"name": now.name, "renamed": RENAMED} | {
        key: [{k: v for k, v in asdict(entry).items() if v is not None} for entry in getattr(now, key)]
        for key in ("tasks", "features")
    }


def drain_changed(config: Config) -> dict[str, Any]:
    report = run_train(config, report=None, drain=True, skip_lost=False, should_stop=lambda: True, change_schema=True)
    assert report is not None
    return report.to_dict()


def served_by_now(config: Config, pairs: Pairs) -> Pairs:
    """The events as the changed service makes them."""
    change = change_to_present(config, WAS)
    converted = []
    for shown, outcomes in pairs:
        impressions, feedback = change.impressions(shown), change.feedback(outcomes)
        impressions.no_label[:] = 0
        impressions.ids[:, change.now.id_slices["slot"]] = 3
        converted.append((impressions, feedback.take(feedback.task >= 0)))
    return converted


def test_a_deployment_changes_its_schema_and_everything_is_accounted_for(
    redis_url: str, namespace: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, redis_url, namespace)
    config = read_config(path)
    pairs = read_pairs(config, world)
    fill_servers(config, pairs[:9], "arrow")
    before = drain(config)
    schema_file = tmp_path / "now.yaml"
    schema_file.write_text(yaml.safe_dump(schema_now()))
    old = {"old_schemas": ["synthetic"]}
    changed_path = write_config(tmp_path, redis_url, namespace, schema=str(schema_file), stream=old)
    changed = read_config(changed_path)
    folder = str(changed.trainer.checkpoint.directory)
    assert run(["-c", str(changed_path), "schema", "diff", "synthetic", str(schema_file), "--checkpoint", folder]) == 0
    told = capsys.readouterr().out
    assert "renamed: task 'loved' (was 'like')" in told
    assert "new: task 'share' (binary)" in told
    assert "impressions that wait have no labels of the new tasks" in told
    assert f"checkpoint of step {before['version']}" in told

    # A producer that has not changed yet goes on beside one that has.
    fill_servers(config, pairs[9:12], "arrow")
    fill_servers(changed, served_by_now(changed, pairs[12:]), "arrow")
    after = drain_changed(changed)

    assert "dropped: feature 'device' (id)" in capsys.readouterr().out
    assert after["lineage"] == before["lineage"]
    with snapshots_of(changed) as store:
        current = store.current()
        assert current is not None
        assert (current.version, current.carried_from) == (after["version"], (WAS.hash,))
    assert conservation_errors(after) == []
    assert after["events"]["impressions"] == sum(len(shown) for shown, _ in pairs)
    assert after["events"]["dead_lettered"] == after["feedback"]["dead_lettered"] == 0
    assert after["feedback"]["dropped"] > 0
    assert run(["-c", str(changed_path), "audit", "--json"]) == 0
    assert '"balanced": true' in capsys.readouterr().out
