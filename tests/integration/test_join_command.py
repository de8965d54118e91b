"""``smes join`` and ``smes train --examples``: joined once, through a kill, and trained on bit for bit."""

import json
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
from smes_cli.train import run_train
from stream.log.event_log import EventLog
from stream.log.open_log import open_event_log
from stream.topics import EXAMPLES
from tests.integration.training import assert_same_weights, fill_servers, read_pairs, totals, train_in_process
from tests.running import read_config, start_smes, until, write_config
from trainer.report import conservation_errors


def join_here(config: Config, directory: Path | None) -> None:
    """Join in this process, with another folder of checkpoints."""
    examples = replace(config.examples, directory=directory)
    how = {"drain": True, "flush": True, "skip_lost": False, "anew": False}
    run_join(replace(config, examples=examples), report=None, should_stop=lambda: True, **how)  # type: ignore[arg-type]


def train_on_examples(config: Config) -> dict[str, Any]:
    """Train on all examples that are in the topic: the report."""
    report = run_train(
        config, report=None, drain=True, skip_lost=False, should_stop=lambda: True, flush=True, examples=True
    )
    assert report is not None
    return report.to_dict()


def _has_written(log: EventLog, records: int, process: "subprocess.Popen[bytes]") -> bool:
    return sum(log.end(EXAMPLES).values()) >= records or process.poll() is not None


def test_a_killed_join_and_a_trainer_give_the_weights_of_one_that_joins_itself(
    redis_url: str, namespace: str, tmp_path: Path, world: Path
) -> None:
    """SIGKILL in the middle of writing loses nothing, and SIGTERM leaves nothing unwritten. Wrong folders are told."""
    examples = {"directory": str(tmp_path / "join"), "checkpoint_interval_s": 0.2, "rows_per_record": 16}
    path = write_config(tmp_path, redis_url, namespace, examples=examples, stream={"events_per_read": 40})
    config, log_file = read_config(path), tmp_path / "join.log"
    pairs = read_pairs(config, world)[:10]
    fill_servers(config, pairs, "arrow")
    with closing(open_event_log(config.event_log)) as log:
        log.ensure_topic(EXAMPLES, log.partitions("impressions"))
        process = start_smes(log_file, "--config", str(path), "join")
        until(partial(_has_written, log, 8, process))
    process.kill()
    process.wait()
    again = start_smes(log_file, "--config", str(path), "join", "--flush", "--report", str(tmp_path / "join.json"))
    until(lambda: "going on from the checkpoint of turn" in log_file.read_text() or again.poll() is not None)
    again.terminate()
    assert again.wait(60) == 0, log_file.read_text()

    ledger = json.loads((tmp_path / "join.json").read_text())["ledger"]
    impressions, feedback = totals(pairs)
    assert ledger["impressions"] == ledger["handed_out"] + ledger["late"] + ledger["duplicate"] == impressions
    assert ledger["feedback"] == feedback
    trained = train_on_examples(config)
    assert trained["events"]["trained"] == ledger["handed_out"]
    assert conservation_errors(trained) == []
    assert_same_weights(tmp_path / "checkpoints", train_in_process(config, pairs, flush=True))

    with pytest.raises(ValueError, match=r"examples.directory: not set"):
        join_here(config, None)
    with pytest.raises(ValueError, match="expected another folder"):
        join_here(config, config.trainer.checkpoint.directory)
    with pytest.raises(CheckpointError, match="no checkpoint, but topic 'examples' has examples"):
        join_here(config, tmp_path / "other")
