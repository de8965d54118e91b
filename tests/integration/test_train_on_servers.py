"""The trainer as a process on real servers does exactly what a trainer on a log in memory does.

Guarantees shown, for both event logs and both codecs: everything appended is read, and both ledgers balance. Weights,
metrics and published scores are, bit for bit, those of a run without servers. The same holds if the trainer is killed
at any moment and started again, or if the server is.
"""

import os
import shutil
import signal
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from smes.errors import CheckpointError, SchemaMismatch
from smes.events import ImpressionBlock
from smes.model.serving import ServingModel
from smes_cli.config import Config
from smes_cli.demo.local_servers import start_kafka, start_valkey
from smes_cli.demo.processes import stop
from smes_cli.features import load_features
from stream.codec.codec import Codec
from tests.integration.training import (
    Pairs,
    assert_same_counts,
    assert_same_weights,
    drain,
    fill_servers,
    leave_features_out,
    newest_step,
    read_pairs,
    snapshots_of,
    totals,
    train_in_process,
)
from tests.running import DEADLINE_S, read_config, read_json, start_smes, until, until_log_says, write_config
from tests.smes_scorer.made_payloads import loaded_from
from trainer.checkpoints import LOCK
from trainer.loop import Trainer
from trainer.report import conservation_errors

_WAITING = "training: waiting for events"


def assert_serves_its_weights(config: Config, trainer: Trainer, pairs: Pairs) -> None:
    """The current snapshot scores bit for bit as the trainer's weights do."""
    with snapshots_of(config) as store:
        manifest = store.current()
        assert manifest is not None
        assert manifest.version == trainer.learner.step_number
        assert manifest.positions.keys() == {"impressions", "feedback"}
        served = loaded_from(store, manifest, trainer.learner.schema)
    expected = ServingModel.from_state(trainer.learner.schema, config.model, trainer.learner.serving_state())
    impressions = ImpressionBlock.concat([block for block, _ in pairs if len(block)])
    scores = served.score(impressions.ids, impressions.numerics)
    np.testing.assert_array_equal(scores, expected.score(impressions.ids, impressions.numerics))
    assert scores[:, 0].std() > 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("codec", ["json", "arrow"])
@pytest.mark.parametrize("kind", ["redis", pytest.param("kafka", marks=pytest.mark.kafka)])
def test_a_process_on_servers_is_a_trainer_in_memory(
    kind: str,
    codec: Codec,
    redis_url: str,
    namespace: str,
    world: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    kafka = request.getfixturevalue("kafka_bootstrap") if kind == "kafka" else None
    path = write_config(tmp_path, redis_url, namespace, kafka=kafka)
    config = read_config(path)
    pairs = read_pairs(config, world)
    appended, looked_up = pairs, 0
    if (kind, codec) == ("redis", "json"):  # events of half of the users leave out what the feature store has
        load_features(config, world)
        appended, looked_up = leave_features_out(config, pairs)
    fill_servers(config, appended[:8], codec)
    log = tmp_path / "train.log"
    process = start_smes(log, "-c", str(path), "train", "--drain", "--report", "report.json")
    until_log_says(log, _WAITING, process)
    fill_servers(config, appended[8:], codec)
    assert stop(process, timeout_s=DEADLINE_S) == 0, log.read_text()

    report = read_json(tmp_path / "report.json")
    assert conservation_errors(report) == []
    assert (report["events"]["impressions"], report["feedback"]["received"]) == totals(pairs)
    assert report["events"]["trained"] > 1000
    assert list(report["features"].values()) == 2 * [{"from_store": looked_up, "not_in_store": 0, "written_later": 0}]
    assert report["snapshots"]["published"] >= 1
    expected = train_in_process(config, pairs)
    assert_same_counts(report, expected)
    assert_same_weights(tmp_path / "checkpoints", expected)
    assert_serves_its_weights(config, expected, pairs)


@pytest.mark.timeout(400)
def test_killed_again_and_again_it_ends_as_if_never_killed(
    redis_url: str, namespace: str, world: Path, tmp_path: Path
) -> None:
    # Small batches make some 250 steps, so that there is time to kill it in the middle of them.
    path = write_config(tmp_path, redis_url, namespace, stream={"batch": {"size": 8}})
    config, checkpoints = read_config(path), tmp_path / "checkpoints"
    pairs = read_pairs(config, world)
    fill_servers(config, pairs, "arrow")
    killed_at = [-1]
    for life in range(2):
        log = tmp_path / f"killed-{life}.log"
        process = start_smes(log, "-c", str(path), "train")
        until_log_says(log, _WAITING, process)
        until(lambda: newest_step(checkpoints) > max(0, killed_at[-1]), "a checkpoint of this life")
        os.kill(process.pid, signal.SIGKILL)
        process.wait(DEADLINE_S)
        killed_at.append(newest_step(checkpoints))
    log = tmp_path / "last.log"
    process = start_smes(log, "-c", str(path), "train", "--drain", "--report", "report.json")
    until_log_says(log, _WAITING, process)
    assert stop(process, timeout_s=DEADLINE_S) == 0, log.read_text()
    assert "going on from the checkpoint of step" in log.read_text()

    expected = train_in_process(config, pairs)
    assert 0 < killed_at[1] < expected.learner.step_number  # it was killed in mid-run
    report = read_json(tmp_path / "report.json")
    assert conservation_errors(report) == []
    assert_same_counts(report, expected)
    assert_same_weights(checkpoints, expected)
    assert_serves_its_weights(config, expected, pairs)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", ["redis", pytest.param("kafka", marks=pytest.mark.kafka)])
def test_a_server_killed_and_restarted_under_it_loses_nothing(
    kind: str, redis_url: str, namespace: str, world: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with ExitStack() as stack:
        outage = {"outage_timeout_s": DEADLINE_S}
        if kind == "redis":
            valkey = stack.enter_context(start_valkey(tmp_path / "valkey"))
            path = write_config(tmp_path, valkey.url, namespace, event_log={"redis": outage})
            pid = valkey.pid
        else:
            home = request.getfixturevalue("kafka_home")
            kafka = stack.enter_context(start_kafka(home, tmp_path / "kafka"))
            path = write_config(tmp_path, redis_url, namespace, kafka=kafka.bootstrap, event_log={"kafka": outage})
            pid = kafka.pid
        config = read_config(path)
        pairs = read_pairs(config, world)
        fill_servers(config, pairs[:8], "json")
        log = tmp_path / "train.log"
        process = start_smes(log, "-c", str(path), "train", "--drain", "--report", "report.json")
        until_log_says(log, _WAITING, process)
        until(lambda: newest_step(tmp_path / "checkpoints") > 0, "a first step")
        os.kill(pid, signal.SIGKILL)
        if kind == "redis":
            valkey.stop()
            stack.enter_context(start_valkey(tmp_path / "valkey", port=valkey.port))
        else:
            kafka.stop()
            stack.enter_context(start_kafka(home, tmp_path / "kafka", port=kafka.port))
        fill_servers(config, pairs[8:], "json")
        assert stop(process, timeout_s=DEADLINE_S) == 0, log.read_text()
        expected = train_in_process(config, pairs)
        report = read_json(tmp_path / "report.json")
        assert conservation_errors(report) == []
        assert_same_counts(report, expected)
        assert_same_weights(tmp_path / "checkpoints", expected)
        assert_serves_its_weights(config, expected, pairs)


def test_a_history_that_was_interrupted_goes_on_as_a_lineage_of_its_own(
    redis_url: str, namespace: str, world: Path, tmp_path: Path
) -> None:
    config = read_config(write_config(tmp_path, redis_url, namespace))
    pairs = read_pairs(config, world)
    checkpoints, saved = tmp_path / "checkpoints", tmp_path / "saved"
    fill_servers(config, pairs[:9], "arrow")
    first = drain(config)
    shutil.copytree(checkpoints, saved)
    fill_servers(config, pairs[9:], "arrow")
    second = drain(config)
    assert second["lineage"] == first["lineage"]
    assert second["version"] > first["version"] > 0
    # Everything since the first checkpoint is lost with the machine; serving has seen it already.
    shutil.rmtree(checkpoints)
    shutil.copytree(saved, checkpoints)
    third = drain(config)
    assert third["lineage"] != first["lineage"]
    assert third["lineage"].partition(".")[0] == first["lineage"]
    assert third["version"] == second["version"]
    expected = train_in_process(config, pairs)
    assert_same_weights(checkpoints, expected)
    assert_serves_its_weights(config, expected, pairs)
    with snapshots_of(config) as store:
        current = store.current()
        assert current is not None
        assert (current.lineage, current.version) == (third["lineage"], third["version"])
        served = {(m.lineage, m.version) for m in store.list()}
    assert (second["lineage"], second["version"]) in served  # the other history stays what it was


def test_another_schema_on_the_same_checkpoints_is_refused_with_both_hashes(
    redis_url: str, namespace: str, world: Path, tmp_path: Path
) -> None:
    config = read_config(write_config(tmp_path, redis_url, namespace))
    fill_servers(config, read_pairs(config, world)[:9], "arrow")
    before = drain(config)
    changed = tmp_path / "changed.yaml"
    changed.write_text(
        "name: changed\ntasks: [{name: click, window_s: 5}, {name: like, window_s: 5}]\nfeatures: [{name: tab}]\n"
    )
    other = replace(config, schema=str(changed))
    with pytest.raises(SchemaMismatch) as caught:
        drain(other)
    assert before["schema"] in str(caught.value)
    assert other.schema_file().schema.hash in str(caught.value)
    assert "checkpoint" in str(caught.value)


def test_topics_that_exist_may_have_another_number_of_partitions_than_new_ones_get(
    redis_url: str, namespace: str, world: Path, tmp_path: Path
) -> None:
    config = read_config(write_config(tmp_path, redis_url, namespace))
    fill_servers(config, read_pairs(config, world)[:1], "arrow")
    three = replace(config, event_log=replace(config.event_log, partitions=3))
    assert drain(three)["events"]["impressions"] == len(read_pairs(config, world)[0][0])


@pytest.mark.parametrize("impressions", [0, 1])
def test_an_empty_log_and_one_impression(
    impressions: int, redis_url: str, namespace: str, world: Path, tmp_path: Path
) -> None:
    config = read_config(write_config(tmp_path, redis_url, namespace))
    if impressions:
        block, feedback = read_pairs(config, world)[0]
        fill_servers(config, [(block.take(slice(0, 1)), feedback.take(slice(0, 0)))], "json")
    report = drain(config)
    assert conservation_errors(report) == []
    assert (report["events"]["impressions"], report["events"]["waiting"]) == (impressions, impressions)
    assert (report["version"], report["events"]["trained"]) == (0, 0)
    click = report["tasks"]["click"]
    assert click.pop("positives") == 0
    assert set(click.values()) == {None}
    again = drain(config)  # its checkpoint can be read
    assert again["lineage"] == report["lineage"]
    assert again["events"] == report["events"]


def test_a_disk_that_refuses_checkpoints_does_not_stop_training_or_publishing(
    redis_url: str, namespace: str, world: Path, tmp_path: Path
) -> None:
    resource = pytest.importorskip("resource")
    config = read_config(write_config(tmp_path, redis_url, namespace))
    pairs = read_pairs(config, world)
    fill_servers(config, pairs, "arrow")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, hard))  # longer files are refused, as by a full disk
    try:
        with pytest.raises(CheckpointError, match=r"step-0.*not written: File too large"):
            drain(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [LOCK]
    assert_serves_its_weights(config, train_in_process(config, pairs), pairs)
