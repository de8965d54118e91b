"""``smes join`` and ``smes train --examples``: one join for several trainers, through kills, bit for bit."""

import subprocess
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from smes.errors import CheckpointError
from smes_cli.config import Config
from smes_cli.join import run_join
from smes_cli.starting_point import WithoutCheckpoint
from smes_cli.train import run_train
from stream.log.event_log import EventLog
from stream.log.open_log import open_event_log
from stream.topics import EXAMPLES
from tests.integration.training import (
    assert_same_weights,
    fill_servers,
    one_thread,
    read_pairs,
    totals,
    train_in_process,
)
from tests.running import read_config, start_smes, until, write_config
from trainer.report import conservation_errors


def join_to_the_end(config: Config, **how: Any) -> dict[str, Any]:
    """Join what is in the log, and close the windows; the report."""
    given = {"drain": True, "flush": True, "skip_lost": False, "anew": False, **how}
    return run_join(config, report=None, should_stop=lambda: True, **given).to_dict()


def train_on_examples(config: Config, folder: Path, *, flush: bool = True, examples: bool = True) -> dict[str, Any]:
    """Another trainer on the same examples: its report."""
    checkpoint = replace(config.trainer.checkpoint, directory=folder)
    store = replace(config.feature_store, namespace=f"{config.feature_store.namespace}-{folder.name}")
    own = replace(config, trainer=replace(config.trainer, checkpoint=checkpoint), feature_store=store)
    report = run_train(
        own,
        report=None,
        drain=True,
        skip_lost=False,
        should_stop=lambda: True,
        flush=flush,
        without_checkpoint=WithoutCheckpoint(),
        examples=examples,
    )
    assert report is not None
    return report.to_dict()


def _has_written(log: EventLog, records: int, process: subprocess.Popen[bytes]) -> bool:
    return written(log) >= records or process.poll() is not None


def written(log: EventLog) -> int:
    """Records in the topic of examples."""
    return sum(log.end(EXAMPLES).values())


@pytest.mark.parametrize("kind", ["redis", pytest.param("kafka", marks=pytest.mark.kafka)])
def test_killed_joins_and_two_trainers_give_the_weights_of_one_that_joins_itself(
    kind: str, request: pytest.FixtureRequest, redis_url: str, namespace: str, tmp_path: Path, world: Path
) -> None:
    """SIGKILL in the middle of writing, thrice; both trainers then have the same bits, and no impression is lost."""
    kafka = request.getfixturevalue("kafka_bootstrap") if kind == "kafka" else None
    examples = {"directory": str(tmp_path / "join"), "checkpoint_interval_s": 0.2, "rows_per_record": 16}
    path = write_config(tmp_path, redis_url, namespace, kafka=kafka, examples=examples, stream={"events_per_read": 40})
    config = read_config(path)
    pairs = read_pairs(config, world)[:10]
    fill_servers(config, pairs, "arrow")
    with closing(open_event_log(config.event_log)) as log:
        log.ensure_topic(EXAMPLES, log.partitions("impressions"))
        for more in (3, 10, 20):
            process, least = start_smes(tmp_path / "join.log", "--config", str(path), "join"), written(log) + more
            until(partial(_has_written, log, least, process))
            process.kill()
            process.wait()
    report = join_to_the_end(config)
    impressions, feedback = totals(pairs)
    ledger = report["ledger"]
    assert ledger["impressions"] == ledger["handed_out"] + ledger["late"] + ledger["duplicate"] == impressions
    assert ledger["feedback"] == feedback

    with one_thread():
        expected = train_in_process(config, pairs, flush=True)
        for name in ("one", "other") if kind == "redis" else ("one",):
            trained = train_on_examples(config, tmp_path / name)
            assert trained["events"]["trained"] == ledger["handed_out"]
            assert conservation_errors(trained) == []
            assert_same_weights(tmp_path / name, expected)


def test_a_join_says_what_it_needs_and_stops_in_good_order(
    redis_url: str, namespace: str, tmp_path: Path, world: Path
) -> None:
    """No folder, the trainer's folder, a topic with examples but no checkpoint; SIGTERM leaves nothing unwritten."""
    path = write_config(tmp_path, redis_url, namespace, examples={"directory": str(tmp_path / "join")})
    config = read_config(path)
    pairs = read_pairs(config, world)[:10]
    fill_servers(config, pairs, "json")
    nowhere = replace(config, examples=replace(config.examples, directory=None))
    with pytest.raises(ValueError, match=r"examples.directory: not set"):
        join_to_the_end(nowhere)
    there = replace(config, examples=replace(config.examples, directory=config.trainer.checkpoint.directory))
    with pytest.raises(ValueError, match="expected another folder"):
        join_to_the_end(there)
    process = start_smes(tmp_path / "join.log", "--config", str(path), "join", "--drain", "--report", "join.json")
    until(lambda: "waiting for events" in (tmp_path / "join.log").read_text())
    process.terminate()
    assert process.wait(60) == 0, (tmp_path / "join.log").read_text()
    elsewhere = replace(config, examples=replace(config.examples, directory=tmp_path / "other"))
    with pytest.raises(CheckpointError, match="no checkpoint, but topic 'examples' has examples"):
        join_to_the_end(elsewhere)
    train_on_examples(config, tmp_path / "one", flush=False)
    with pytest.raises(CheckpointError, match="state of a training on the topic examples"):
        train_on_examples(config, tmp_path / "one", flush=False, examples=False)
