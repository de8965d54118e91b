"""One version, frozen: ``smes evaluate``, ``smes score`` and ``smes export`` give the scores of its serving model.

The reference is naive: features are filled value by value from the files, the model is read from Redis, and
scikit-learn computes the metrics.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from feature_store.folding import read_weights
from smes.hashing import encode_id
from smes.model.serving import ServingModel
from smes_cli.__main__ import EXIT_FAILED, EXIT_USAGE, run
from smes_cli.config import Config
from smes_cli.primed_start import PrimedStart
from tests.e2e.shop import Shop, write_shop
from tests.integration.test_primed_by_a_log import drain_primed
from tests.integration.training import snapshots_of
from tests.running import environment, read_config, read_json, write_config


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return write_shop(tmp_path_factory.mktemp("shop"), visits=600)


@pytest.fixture
def served(shop: Shop, redis_url: str, namespace: str, tmp_path: Path) -> tuple[Path, Config, str]:
    """The configuration file, the same read, and a version in Redis: a backtest primed a trainer, which published."""
    path = write_config(tmp_path, redis_url, namespace, schema=str(shop.schema), model={"ranker": "linear"})
    assert run(["-q", "-c", str(path), "backtest", str(shop.folder), "--checkpoint", str(tmp_path / "primed")]) == 0
    report = drain_primed(read_config(path), PrimedStart(tmp_path / "primed"))
    return path, read_config(path), f"{report['lineage']}:{report['version']}"


def naive_rows(shop: Shop) -> list[dict[str, Any]]:
    """Feature → value of every visit, in the order of the file."""
    plans = {row["id"]: row["plan"] for row in table(shop.folder / "customers.csv")}
    products = {row["sku"]: row for row in table(shop.folder / "products.csv")}
    return [
        {
            "user_id": row["customer"],
            "item_id": int(row["product"]),
            "plan": plans[row["customer"]],
            "brand": products[row["product"]]["brand"],
            "price": float(products[row["product"]]["price"]),
            "page": row["page_name"],
        }
        for row in table(shop.folder / "visits.csv")
    ]


def naive_scores(config: Config, version: str, rows: list[dict[str, Any]]) -> Any:
    """Scores of the weights in Redis, float32 [N, T]."""
    schema = config.schema_file().schema
    lineage, number = version.split(":")
    with snapshots_of(config) as store:
        tensors, _ = read_weights(store, store.get(lineage, int(number)))
    model = ServingModel.from_state(schema, config.model, tensors)
    ids = np.array([[encode_id(row[f.name]) for f in schema.id_features] for row in rows], np.int64)
    return model.score(ids, np.array([[row["price"]] for row in rows], np.float32))


def test_the_scores_of_a_version_are_those_of_its_serving_model(
    shop: Shop, served: tuple[Path, Config, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, config, version = served
    rows = naive_rows(shop)
    expected = naive_scores(config, version, rows)
    tasks = [task.name for task in config.schema_file().schema.tasks]

    # evaluate: the repeated visit is dropped, as in training
    written = tmp_path / "evaluated.json"
    asked = ["evaluate", str(shop.folder), "--version", version, "--report", str(written)]
    assert run(["-c", str(path), *asked]) == 0
    report = read_json(written)
    visits = table(shop.folder / "visits.csv")[:-1]
    assert report["impressions"] == len(visits) == shop.visits
    for t, column in ((0, "is_open"), (1, "sold")):
        auc = roc_auc_score([int(visit[column]) for visit in visits], expected[:-1, t])
        assert report["tasks"][tasks[t]]["auc"] == pytest.approx(auc, abs=2e-3)
        assert report["tasks"][tasks[t]]["positives"] == shop.positives[tasks[t]]

    # score: a Parquet file without labels, in which a row has no user
    file = tmp_path / "shop" / "to_score.parquet"
    file.parent.mkdir()
    for name in ("customers.csv", "products.csv"):
        (file.parent / name).write_text((shop.folder / name).read_text())
    columns: dict[str, Any] = {
        "customer": [row["user_id"] for row in rows],
        "product": [row["item_id"] for row in rows],
        "page_name": [row["page"] for row in rows],
        "shown_at": [1_700_000_000] * len(rows),
    }
    columns["customer"][3] = None
    pq.write_table(pa.table(columns), file)
    capsys.readouterr()
    assert run(["-c", str(path), "score", str(file), "--version", version, "--out", str(tmp_path / "out.parquet")]) == 0
    assert "1 rows without a score: user_id (customer) is empty" in capsys.readouterr().out
    scored = pq.read_table(tmp_path / "out.parquet")
    assert scored.column_names == ["customer", "product", "shown_at", *(f"score_{task}" for task in tasks)]
    assert scored.select(["customer", "product", "shown_at"]).to_pydict() == {
        name: columns[name] for name in ("customer", "product", "shown_at")
    }
    for t, task in enumerate(tasks):
        got = scored.column(f"score_{task}").to_pylist()
        assert [i for i, value in enumerate(got) if value is None] == [3]
        np.testing.assert_allclose(np.delete(got, 3).astype(np.float32), np.delete(expected[:, t], 3), rtol=1e-5)

    # export: scored by score.py in a process of its own, elsewhere
    folder = tmp_path / "exported"
    assert run(["-c", str(path), "export", str(folder), "--version", version]) == 0
    lines = "".join(json.dumps(row) + "\n" for row in rows[:20])
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    command = [sys.executable, str(folder / "score.py")]
    ended = subprocess.run(command, input=lines, cwd="/", env=env, check=True, capture_output=True, text=True)
    alone = [[json.loads(line)[task] for task in tasks] for line in ended.stdout.splitlines()]
    np.testing.assert_allclose(alone, expected[:20], rtol=1e-5)
    assert (folder / "dense.pt2").exists()


def test_wrong_input_is_one_line_and_leaves_nothing_behind(
    shop: Shop, served: tuple[Path, Config, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _, version = served
    full, out = tmp_path / "full", str(tmp_path / "out.parquet")
    full.mkdir()
    (full / "file").touch()
    other = tmp_path / "other.yaml"
    other.write_text(shop.schema.read_text().replace("name: plan,", "name: plan, dim: 4,"))
    log = str(shop.folder)
    for arguments, code, expected in (
        (["evaluate", log], EXIT_USAGE, "expected either --version"),
        (["evaluate", log, "--version", "1:2:3"], EXIT_USAGE, "expected VERSION or LINEAGE:VERSION"),
        (["evaluate", log, "--version", "99999"], EXIT_FAILED, "99999"),
        (["evaluate", log, "--version", version, "--schema", str(other)], EXIT_USAGE, "plan"),
        (["evaluate", log, "--checkpoint", str(full)], EXIT_FAILED, "no checkpoint in it"),
        (["score", log, "--version", version, "--out", str(tmp_path / "out.csv")], EXIT_USAGE, "ends in .parquet"),
        (["score", str(full / "none.parquet"), "--version", version, "--out", out], EXIT_FAILED, "no such file"),
        (["export", str(full), "--version", version], EXIT_USAGE, "expected an empty folder or none"),
    ):
        assert run(["-c", str(path), *arguments]) == code, arguments
        error = capsys.readouterr().err.strip()
        assert expected in error
        assert len(error.splitlines()) == 1, error
    assert not [*tmp_path.glob("*out*"), *tmp_path.glob("*.partial")]
