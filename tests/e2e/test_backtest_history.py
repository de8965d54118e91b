"""``smes backtest`` on a log where only the user's history predicts the clicks: with the history and without it.

There are two kinds of items. In every round a user clicks items of the other kind than in the round before, so nothing
learned about the user stays true, but the outcomes of the last round predict everything. What the history at the start
of the window (or of the request) knows must show within users too.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smes_cli.backtest import run_backtest
from smes_cli.config import Config, load_config

USERS, ROUNDS, ITEMS = 1000, 8, 4
ROUND_S = 1000
SCHEMA = """
name: kinds
tasks: [{name: click, window_s: 20}]
features:
  - {name: kind, source: item}
  - {name: recent_items, kind: sequence, max_length: 4, vocabulary: item_id, query: item_id}
  - {name: recent_outcomes, kind: sequence, max_length: 4, accompanies: recent_items}
HISTORY
log: {user_id: user, item_id: item, event_time: at, REQUEST labels: {click: {column: clicked}}}
"""


def write_log(folder: Path) -> Path:
    """Every user sees four items in every round of 1,000 s, each user at another moment of the round."""
    rng = np.random.default_rng(0)
    n = USERS * ROUNDS * ITEMS
    visit = np.repeat(np.arange(USERS * ROUNDS), ITEMS)
    user = visit % USERS
    started_s = visit // USERS * ROUND_S + rng.permuted(np.arange(USERS * ROUNDS) % USERS)[visit] * 0.7
    item = rng.integers(0, 40, n)
    kind_liked = (rng.integers(0, 2, USERS)[user] + visit // USERS) % 2
    likely = np.where(item % 2 == kind_liked, 0.9, 0.1)
    log = {
        "user": user,
        "item": item,
        "kind": item % 2,
        "visit": visit,
        "at": ((1_700_000_000 + started_s + 0.01 * (np.arange(n) % ITEMS)) * 1000).astype(np.int64),
        "clicked": rng.random(n) < likely,
    }
    path = folder / "kinds.parquet"
    pq.write_table(pa.table(log), path)
    return path


def click_of(folder: Path, log: Path, *, history: str, request: str) -> tuple[float, float]:
    """AUC and windowed GAUC of the clicks."""
    schema = folder / "kinds.yaml"
    schema.write_text(SCHEMA.replace("HISTORY", history).replace("REQUEST", request))
    (folder / "smes.yaml").write_text(json.dumps({"schema": str(schema), "trainer": {"device": "cpu"}}))
    config: Config = load_config(folder / "smes.yaml", {})
    result = run_backtest(config, log, limit=None, seed=0, baseline=None, should_stop=lambda: False)
    assert result.report.events.trained == USERS * ROUNDS * ITEMS
    click = result.report.tasks["click"]
    assert click.auc is not None
    assert click.gauc_windowed is not None
    return click.auc, click.gauc_windowed


@pytest.mark.parametrize("request_key", ["", "request_id: visit,"], ids=["windows", "requests"])
def test_the_history_helps_between_users_and_within_them(tmp_path: Path, request_key: str) -> None:
    log = write_log(tmp_path)
    history = f"history: {{items: recent_items, outcomes: recent_outcomes, window_s: {ROUND_S}}}"
    auc, gauc = click_of(tmp_path, log, history=history, request=request_key)
    # The same schema, and a log whose sequences are empty.
    empty_log = tmp_path / "empty"
    empty_log.mkdir()
    table = pq.read_table(log)
    empty = pa.array([[]] * len(table), pa.list_(pa.int64()))
    table = table.append_column("recent_items", empty).append_column("recent_outcomes", empty)
    pq.write_table(table, empty_log / "kinds.parquet")
    auc_without, gauc_without = click_of(tmp_path, empty_log, history="", request=request_key)
    assert auc > auc_without + 0.05
    assert gauc > gauc_without + 0.05


def test_windows_of_evaluation_over_those_of_the_history_are_refused(tmp_path: Path) -> None:
    log = write_log(tmp_path)
    schema = tmp_path / "kinds.yaml"
    history = f"history: {{items: recent_items, outcomes: recent_outcomes, window_s: {ROUND_S}}}"
    schema.write_text(SCHEMA.replace("HISTORY", history).replace("REQUEST", ""))
    (tmp_path / "smes.yaml").write_text(f"schema: {schema}")
    config = load_config(tmp_path / "smes.yaml", {"SMES_TRAINER__EVALUATION__WINDOW_S": "1500"})
    with pytest.raises(ValueError, match=r"EvaluationConfig\.window_s: 1500.*whole part.*history\.window_s 1000"):
        run_backtest(config, log, limit=None, seed=0, baseline=None, should_stop=lambda: False)
