"""A feature and a task come to a running deployment: only the trainer is restarted, the service goes on asking."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from smes_cli.__main__ import run
from smes_cli.demo.processes import stop
from smes_client import Events, Scorer, ScorerUnavailable
from tests.integration.training import snapshots_of
from tests.running import environment, read_config, start_smes, until, until_log_says, write_config

OLD = """
name: kiosk
tasks: [{name: click, window_s: 0.5}, {name: save, window_s: 0.5}]
features: [{name: page}, {name: taste, source: user}]
"""
NEW = """
name: kiosk
tasks: [{name: share, window_s: 0.5}, {name: click, window_s: 0.5}, {name: save, window_s: 0.5}]
features: [{name: device}, {name: page}, {name: taste, source: user}]
"""
STREAM = {"batch": {"size": 64, "max_wait_s": 0.1}, "join": {"allowed_lateness_s": 0.1}, "idle_after_s": 1.0}
ITEMS = list(range(20))
ROOT = Path(__file__).parents[2]
REDIS, SCORER = "redis://127.0.0.1:6379/0", "http://127.0.0.1:8000"


class Service:
    """Shows items and reports what became of them: more often something where user and item are of unlike parity."""

    def __init__(self, events: Events, features: dict[str, int], tasks: tuple[str, ...]) -> None:
        self._events, self._features, self._tasks = events, features, tasks
        self._rng = np.random.default_rng(0)

    def play(self, requests: int = 4) -> None:
        for _ in range(requests):
            user = int(self._rng.integers(0, 30))
            for item in self._rng.choice(ITEMS, 5, replace=False).tolist():
                shown = self._events.impression(user=user, item=item, features=self._features)
                for task in self._tasks:
                    if self._rng.random() < (0.6 if (user + item) % 2 else 0.1):
                        self._events.feedback(shown.impression_id, task)
        self._events.flush()

    def play_until(self, condition: Callable[[], bool], what: str) -> None:
        def played() -> bool:
            self.play()
            return condition()

        until(played, what, within_s=40)


def run_readme(folder: Path, instead: dict[str, str]) -> None:
    """Run README's client in a folder with its schema file, at the addresses of this test."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    for written, here in instead.items():
        assert written in program
        program = program.replace(written, here)
    subprocess.run([sys.executable, "-P", "-c", program], check=True, cwd=folder, env=environment())


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.mark.timeout(180)
def test_a_feature_and_a_task_are_added_while_the_scorer_runs(
    redis_url: str, tmp_path: Path, stack: ExitStack, capsys: pytest.CaptureFixture[str]
) -> None:
    schema, namespace = tmp_path / "kiosk.yaml", "live-change"
    schema.write_text(OLD)
    shutil.copy(schema, tmp_path / "old.yaml")
    config = str(write_config(tmp_path, redis_url, namespace, schema=str(schema), stream=STREAM))
    serve, train = tmp_path / "serve.log", tmp_path / "train.log"
    scorer_process = start_smes(serve, "--config", config, "serve")
    trainer = start_smes(train, "--config", config, "train")
    until_log_says(serve, "listening on", scorer_process)
    [url] = re.findall(r"http://[0-9.:]+", serve.read_text())

    scorer = stack.enter_context(Scorer(url, tmp_path / "old.yaml"))

    def version() -> int:
        try:
            return scorer.score(1, ITEMS, {"page": 1}).version
        except ScorerUnavailable:
            return -1

    with Events(tmp_path / "old.yaml", redis_url, namespace=namespace) as events:
        service = Service(events, {"page": 1}, ("click", "save"))
        service.play_until(lambda: version() > 5, "versions of the old schema in service")
    run_readme(tmp_path, {"redis)": f"redis, namespace={namespace!r})", REDIS: redis_url, SCORER: url})
    assert stop(trainer, timeout_s=60) == 0, train.read_text()
    with snapshots_of(read_config(Path(config))) as store:
        current = store.current()
    assert current is not None
    published = current.version
    until(lambda: version() == published, "the last version of the old schema in service")
    before = scorer.score(1, ITEMS, {"page": 1})

    schema.write_text(NEW)
    changed = tmp_path / "changed.log"
    change_over = STREAM | {"old_schemas": [str(tmp_path / "old.yaml")]}
    old_events = write_config(
        tmp_path,
        redis_url,
        namespace,
        schema=str(schema),
        stream=change_over,
    )
    trainer = start_smes(changed, "--config", str(old_events), "train", "--change-schema")
    until(lambda: version() > published, f"a version of the new schema in service: {changed.read_text()}")
    after = scorer.score(1, ITEMS, {"page": 1})

    assert after.lineage == before.lineage
    assert after.version == before.version + 1, "the version of the change itself, before any step under the new schema"
    for now, then in zip(after.items, before.items, strict=True):
        assert now.item_id == then.item_id
        assert {task: now.scores[task] for task in then.scores} == then.scores
        assert set(now.scores) == {"share", "click", "save"}

    with Events(tmp_path / "old.yaml", redis_url, namespace=namespace) as events:  # a producer that was not changed yet
        Service(events, {"page": 1}, ("click",)).play(40)
    with Events(schema, redis_url, namespace=namespace) as events:
        service = Service(events, {"page": 1, "device": 3}, ("share", "click"))
        service.play_until(lambda: version() > after.version + 5, "versions with steps of the new schema")
    assert stop(trainer, timeout_s=60) == 0, changed.read_text()
    assert run(["--config", str(old_events), "audit", "--json"]) == 0, capsys.readouterr().out
    assert scorer_process.poll() is None
    with Scorer(url, schema) as asked:
        assert "share" in asked.score(1, ITEMS, {"page": 1, "device": 3}).items[0].scores
    assert stop(scorer_process) == 0
