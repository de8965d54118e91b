"""``/metrics`` and ``/health`` of a real ``smes train``: what is scraped equals the run's report."""

import json
import re
import signal
import threading
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from smes.errors import SmesError
from smes_cli.demo.processes import log_tail
from smes_io.secrets import SecretPlace
from tests.integration.training import fill_servers, read_pairs, totals
from tests.running import read_config, read_json, start_smes, until, until_log_says, write_config
from trainer.config import HttpConfig
from trainer.history import read_history
from trainer.http import TrainerServer

TOKEN = "a-token-of-this-test"

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scraped(http: httpx.Client) -> Samples:
    """(Name, labels) → value, as Prometheus reads it."""
    answer = http.get("/metrics").raise_for_status()
    families = text_string_to_metric_families(answer.text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def of(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"smes_trainer_{name}", tuple(sorted(labels.items()))]


def test_what_is_scraped_is_what_the_report_says(redis_url: str, namespace: str, world: Path, tmp_path: Path) -> None:
    seen: dict[str, Any] = {"http": {"port": 0}, "history": {"directory": str(tmp_path / "history")}}
    path = write_config(tmp_path, redis_url, namespace, trainer={**seen, "gate": {"enabled": True}})
    config = read_config(path)
    pairs = read_pairs(config, world)
    fill_servers(config, pairs, "json")
    impressions, feedback = totals(pairs)
    log, out = tmp_path / "train.log", tmp_path / "report.json"

    process = start_smes(log, "-c", str(path), "train", "--report", str(out))
    until_log_says(log, "training: waiting for events", process)
    found = re.search(r"metrics: (http://\S+)/metrics", log_tail(log, 100))
    assert found is not None
    with httpx.Client(base_url=found[1]) as http:
        assert http.get("/health/live").json() == {"status": "live"}

        def is_done() -> bool:
            now = scraped(http)
            lag = [value for (name, _), value in now.items() if name == "smes_trainer_lag_records"]
            reads = [("impressions_read_total", impressions), ("feedback_read_total", feedback)]
            return bool(lag) and not any(lag) and all(of(now, name) == count for name, count in reads)

        until(is_done, "everything read")
        before = scraped(http)

        def stands_still() -> bool:
            """Whether a copy of a second later, full of waiting for events, has no further step."""
            nonlocal before
            threading.Event().wait(0.1)
            now = scraped(http)
            if of(now, "steps_total") != of(before, "steps_total"):
                before = now
            return of(now, "seconds_total", part="read") > of(before, "seconds_total", part="read") + 0.5

        until(stands_still, "nothing left to train on")
        samples = scraped(http)
        assert http.get("/health/ready").json() == {"status": "ready", "problems": {}}
        stats, told = http.get("/v1/stats").raise_for_status().json(), http.get("/v1/history?after=0&last=2").json()
        assert "experts" not in http.get("/v1/stats?without=experts").json()
        for wrong in ("stats?without=rows", "stats?with=it", "history?last=0", "history?after=x", "history?from=1"):
            assert http.get(f"/v1/{wrong}").status_code == 400, wrong
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, log_tail(log, 40)
    report, lines = read_json(out), list(read_history(tmp_path / "history"))

    for section, total in (("events", "impressions"), ("feedback", "received")):
        name = "impressions" if section == "events" else "feedback"
        counts = dict(report[section])
        assert of(samples, f"{name}_read_total") == counts.pop(total)
        assert of(samples, f"{name}_waiting") == counts.pop("waiting")
        for beside in ("gaps", "unreadable"):
            assert of(samples, f"{name}_{beside}_total") == counts.pop(beside)
        for outcome, count in counts.items():
            assert of(samples, f"{name}_total", outcome=outcome) == count, outcome
    assert of(samples, "step") == report["version"] == of(samples, "steps_total")
    assert of(samples, "rows") == report["rows"]["in_use"]
    for task, figures in report["tasks"].items():
        for key, value in figures.items():
            if value is not None and key != "gauc_windowed":  # the report's has the open window, too
                assert of(samples, f"task_{key}", task=task, over="run") == value, (task, key)
    assert of(samples, "experts_dead") == report["routing"]["dead"]
    shares = [value for (name, _), value in samples.items() if name == "smes_trainer_expert_load_share"]
    assert sum(shares) == pytest.approx(1)
    assert of(samples, "gate_cuts_total", outcome="refused") == report["gate"]["refused"]
    assert samples["process_resident_memory_bytes", ()] > 50e6
    assert sum(value for (name, _), value in samples.items() if name == "smes_trainer_seconds_total") > 0.1
    assert 0 <= of(samples, "cut_age_seconds") < 60
    assert 0 <= of(samples, "checkpoint_age_seconds") < 60
    # Nothing is left to read; what waits for feedback is not trained on yet.
    assert {value for (name, _), value in samples.items() if name == "smes_trainer_lag_seconds"} == {0.0}
    assert 1 < of(samples, "trained_lag_seconds") < 30

    check_stats(stats, report, samples, impressions)
    left = [read_json(tmp_path / "history" / name) for name in ("report.json", "experts.json")]
    assert left == [report, stats["experts"]]
    assert told == {"lines": lines[1:][-2:], "next": len(lines) - 1, "first": 0}

    newest = lines[-1]
    assert len(lines) == sum(line["windows"] for line in lines) > 2
    for task, figures in newest["tasks"].items():
        if figures["auc"] is not None:
            assert of(samples, "task_auc", task=task, over="window") == figures["auc"]
    assert newest["lag"] is None or newest["lag"]["records"] >= 0


def check_stats(stats: dict[str, Any], report: dict[str, Any], samples: Samples, impressions: int) -> None:
    """What ``/v1/stats`` said at rest is what the run's report says, and its own figures agree with each other."""
    changes = {"throughput", "snapshots", "gate"}  # with the time, and with the last cut
    assert stats["report"].keys() == report.keys()
    assert {k: v for k, v in stats["report"].items() if k not in changes} == {
        k: v for k, v in report.items() if k not in changes
    }
    assert stats["problems"] == {}
    ends = {topic: {p: lag["end"] for p, lag in of.items()} for topic, of in stats["lag"]["partitions"].items()}
    assert ends == stats["positions"]
    assert stats["lag"]["records"] == 0
    assert stats["step"] == report["version"]
    assert stats["lineage"] == report["lineage"]
    rates, over_s = stats["rates"], stats["rates"]["over_s"]
    assert rates["events"].keys() == report["events"].keys()
    assert rates["feedback"].keys() == report["feedback"].keys()
    if over_s < 9:  # then it looks back to the start
        assert rates["steps"] * over_s == pytest.approx(report["version"])
        assert rates["events"]["impressions"] * over_s == pytest.approx(impressions)
        assert sum(stats["step_ms"].values()) * report["version"] == pytest.approx(1000 * over_s, rel=0.3)
    assert set(stats["step_ms"]) == {"read", "prepare", "evaluate", "step", "results", "duties"}
    memory = stats["memory"]
    assert memory["rss"] > 50e6
    assert 0 < memory["dense"] < memory["optimizer"] + memory["dense"]
    assert memory["table"] == of(samples, "memory_bytes", part="table") > report["rows"]["in_use"] * 4
    assert memory["join"] > 0
    assert 0 <= stats["cut_age_s"] < 60
    assert 0 <= stats["checkpoint_age_s"] < 60

    experts, routing = stats["experts"], report["routing"]
    assert experts["tasks"] == list(report["tasks"])
    last = [segment for segment in experts["segments"] if not segment["open"]][-1:] or experts["segments"]
    load_TE = np.array(last[-1]["load"])
    assert load_TE.shape == (len(report["tasks"]), experts["num_experts"])
    assert len(last[-1]["dead"]) == routing["dead"] == int((load_TE.sum(axis=0) == 0).sum())
    assert [s["steps"][0] for s in experts["segments"]] == [0, *(s["steps"][1] for s in experts["segments"][:-1])]
    assert experts["segments"][-1]["steps"][1] == report["version"]
    assert sum(s["instances"] for s in experts["segments"]) == report["events"]["trained"]
    assert len(experts["drift"]) == len(experts["segments"])
    if routing["overlap"] is not None:
        shared_TT = np.array(experts["shared"])
        assert shared_TT[np.triu_indices(len(shared_TT), 1)].mean() == pytest.approx(routing["overlap"], abs=1e-4)


class Answers:
    """Says what it was asked for."""

    def stats(self, query: dict[str, str]) -> str:
        return json.dumps(query)

    history = stats


def test_tokens_and_what_is_said_before_the_training_begins(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(f"{TOKEN}\n")
    server = TrainerServer(HttpConfig(port=0, tokens=SecretPlace(file=tmp_path / "tokens")))
    server.start()
    try:
        with pytest.raises(SmesError, match=rf"trainer\.http: 127\.0\.0\.1:{server.port} cannot be listened on"):
            TrainerServer(HttpConfig(port=server.port))
        url, shown = f"http://127.0.0.1:{server.port}", {"authorization": f"Bearer {TOKEN}"}
        assert httpx.get(f"{url}/health/live").status_code == 200
        assert httpx.get(f"{url}/health/ready").status_code == 503
        assert httpx.get(f"{url}/metrics").status_code == 401
        assert httpx.get(f"{url}/metrics", headers=shown).status_code == 503
        for path in ("/v1/stats", "/v1/history"):
            assert httpx.get(f"{url}{path}").status_code == 401
            assert httpx.get(f"{url}{path}", headers=shown).status_code == 503
        server.show(CollectorRegistry(), lambda: {"steps": "3 in a row failed"}, Answers())
        assert httpx.get(f"{url}/v1/stats?a=1", headers=shown).json() == {"a": "1"}
        assert httpx.get(f"{url}/metrics", headers=shown).status_code == 200
        assert httpx.get(f"{url}/metrics", headers={"authorization": "Bearer wrong"}).status_code == 401
        assert httpx.get(f"{url}/health/ready").json() == {"status": "ready"}
        known = httpx.get(f"{url}/health/ready", headers=shown).json()
        assert known == {"status": "degraded", "problems": {"steps": "3 in a row failed"}}
        assert httpx.get(f"{url}/elsewhere", headers=shown).status_code == 404
        assert httpx.post(f"{url}/metrics").status_code == 501
    finally:
        server.stop()
