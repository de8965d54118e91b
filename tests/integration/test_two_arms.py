"""Two trainers, one scorer that splits the users between them, and a producer that logs what was served.

Guarantees shown: both trainers learn from the whole log, whoever answered, and each says the same of the two arms.
"""

import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from smes.arm_names import arm_column
from smes.events import ImpressionBlock
from smes.schema import Schema
from smes_cli.demo.processes import stop
from tests.integration.training import Pairs, drain, fill_servers, read_pairs
from tests.running import DEADLINE_S, read_config, start_smes, until, until_log_says, write_config
from trainer.report import conservation_errors


def serve(http: httpx.Client, block: ImpressionBlock, schema: Schema) -> list[str]:
    """Ask for each impression, and write into the block what was answered; the arms."""
    arms = []
    for row in range(len(block)):
        request = {"user_id": int(block.user_id[row]), "items": [int(block.item_id[row])]}
        answer: dict[str, Any] = http.post("/v1/score", json=request).raise_for_status().json()
        [item] = answer["items"]
        block.served_version[row] = answer["version"]
        block.served_scores[row] = [item["scores"][task.name] for task in schema.tasks]
        arms.append(answer["arm"])
    block.served_arm[:] = arm_column(arms)
    return arms


@pytest.mark.timeout(300)
def test_two_trainers_learn_from_the_whole_log_and_agree_on_the_arms(
    redis_url: str, namespace: str, world: Path, tmp_path: Path
) -> None:
    other = f"{namespace}-wider"
    arms = {"wider": {"namespace": other, "share": 0.5}}
    path = write_config(tmp_path / "main", redis_url, namespace, scorer={"arms": arms})
    wider_path = write_config(
        tmp_path / "wider",
        redis_url,
        namespace,
        feature_store={"namespace": other},
        model={"embedding_dim": 16},
        trainer={"evaluation": {"arm": "wider"}},
    )
    configs = read_config(path), read_config(wider_path)
    schema = configs[0].schema_file().schema
    pairs = read_pairs(configs[0], world)
    fill_servers(configs[0], pairs[:8], "arrow")
    for config in configs:
        assert drain(config)["arms"] == {}  # nothing was served yet

    log = tmp_path / "serve.log"
    scorer = start_smes(log, "-c", str(path), "serve")
    until_log_says(log, "scorer: listening on", scorer)
    [url] = re.findall(r"listening on (\S+)", log.read_text())
    answered: list[str] = []
    with httpx.Client(base_url=url, timeout=60) as http:
        until(lambda: http.get("/health/ready").status_code == 200)
        until(lambda: http.get("/health/ready").json()["arms"]["wider"]["ready"])
        for block, _ in pairs[8:]:
            answered += serve(http, block, schema)
    assert stop(scorer, timeout_s=DEADLINE_S) == 0, log.read_text()
    fill_servers(configs[0], pairs[8:], "json")

    reports = [drain(config, flush=True) for config in configs]

    assert reports[0]["arms"] == reports[1]["arms"]
    assert set(answered) == {"main", "wider"}
    served = {arm: figures["impressions"] for arm, figures in reports[0]["arms"].items()}
    assert served == {arm: answered.count(arm) for arm in ("main", "wider")}
    for report in reports:
        assert conservation_errors(report) == []
        assert report["events"]["trained"] == sum(len(block) for block, _ in pairs)
    check_mean_labels(reports[0]["arms"], pairs, schema)


def check_mean_labels(arms: dict[str, Any], pairs: Pairs, schema: Schema) -> None:
    """The mean label of clicks is what the feedback says of the impressions of an arm, but for what came too late."""
    click = schema.task_index["click"]
    blocks = ImpressionBlock.concat([block for block, _ in pairs if len(block)])
    clicked = np.concatenate([f.impression_id[(f.task == click) & (f.value == 1)] for _, f in pairs])
    for arm, figures in arms.items():
        rows = (blocks.served_arm == arm_column([arm])).all(axis=1)
        share = np.isin(blocks.impression_id[rows], clicked).mean()
        assert figures["tasks"]["click"]["mean_label"]["value"] == pytest.approx(share, abs=0.02)
        assert figures["tasks"]["click"]["scored"] == rows.sum()
