"""The folder of checkpoints is lost while a model is in service, on a real Redis.

Guarantee shown: no untrained weights replace the model. The trainer says so and asks; ``--from-snapshot`` goes on from
what serves, ``--anew`` starts over.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from feature_store.folding import read_weights
from feature_store.publication import Manifest
from feature_store.snapshots import SnapshotStore
from smes.errors import ServingWithoutCheckpoint, SnapshotError
from smes_cli.config import Config
from smes_cli.starting_point import WithoutCheckpoint
from smes_cli.train import run_train
from smes_io.redis_client import connect
from tests.integration.training import Pairs, drain, fill_servers, newest_step, read_pairs, snapshots_of
from tests.running import read_config, write_config
from trainer.report import conservation_errors

FROM_SNAPSHOT, ANEW = WithoutCheckpoint(from_snapshot=True), WithoutCheckpoint(anew=True)


@pytest.fixture
def config(redis_url: str, namespace: str, tmp_path: Path) -> Config:
    return read_config(write_config(tmp_path, redis_url, namespace))


@pytest.fixture
def pairs(config: Config, world: Path) -> Pairs:
    return read_pairs(config, world)


@pytest.fixture
def served(config: Config, pairs: Pairs, tmp_path: Path) -> Manifest:
    """What a trainer left in service, after versions before it, whose folder of checkpoints is gone."""
    for some in (pairs[:8], pairs[8:9]):  # each run trains, and publishes at its end
        fill_servers(config, some, "arrow")
        drain(config)
    shutil.rmtree(tmp_path / "checkpoints")
    return current(config)


def current(config: Config) -> Manifest:
    with snapshots_of(config) as store:
        manifest = store.current()
    assert manifest is not None
    return manifest


def test_without_a_word_the_trainer_stops_and_the_model_stays(config: Config, served: Manifest, tmp_path: Path) -> None:
    in_service = rf"no checkpoint, but version {served.version} of lineage {served.lineage} is in service"
    with pytest.raises(ServingWithoutCheckpoint, match=rf"{in_service}.*--from-snapshot.*--anew"):
        drain(config)

    assert current(config) == served
    assert newest_step(tmp_path / "checkpoints") == -1


def by_key(store: SnapshotStore, manifest: Manifest) -> dict[str, NDArray[Any]]:
    """The weights of a version, its rows by key."""
    tensors, _ = read_weights(store, manifest)
    order = np.argsort(tensors["table.keys"].numpy())
    return {name: t.numpy()[order] if name.startswith("table.") else t.numpy() for name, t in tensors.items()}


def test_from_the_snapshot_it_goes_on_as_a_fork_with_the_served_weights(
    config: Config, served: Manifest, tmp_path: Path
) -> None:
    report = drain(config, FROM_SNAPSHOT)

    now = current(config)
    assert now.lineage == report["lineage"]
    assert now.lineage.partition(".")[0] == served.lineage
    assert (now.version, report["version"]) == (served.version, served.version)
    assert now.positions == served.positions
    with snapshots_of(config) as store:
        weights, expected = by_key(store, now), by_key(store, served)
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(weights[name], tensor, err_msg=name)
    assert newest_step(tmp_path / "checkpoints") == served.version


def test_from_the_snapshot_what_comes_after_its_positions_is_trained_on(
    config: Config, served: Manifest, pairs: Pairs
) -> None:
    fill_servers(config, pairs[9:], "arrow")

    report = drain(config, FROM_SNAPSHOT, flush=True)

    assert conservation_errors(report) == []
    after = sum(len(block) for block, _ in pairs[9:])
    assert (report["events"]["impressions"], report["events"]["trained"]) == (after, after)
    assert report["version"] > served.version
    assert current(config).version == report["version"]


def test_from_the_snapshot_means_the_one_that_an_operator_went_back_to(config: Config, served: Manifest) -> None:
    with snapshots_of(config) as store:
        good = next(manifest for manifest in reversed(store.list()) if manifest.version < served.version)
        store.operator.rollback(good.version, why="the newest is bad", by="a test")
        expected = by_key(store, good)

    drain(config, FROM_SNAPSHOT)

    with snapshots_of(config) as store:
        in_service = store.to_serve()
        first = next(manifest for manifest in store.list() if manifest.lineage != served.lineage)
        weights = by_key(store, first)
    assert in_service is not None
    assert (in_service.lineage, in_service.version) == (good.lineage, good.version)  # pinned, until somebody unpins
    assert (first.version, first.positions) == (good.version, good.positions)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(weights[name], tensor, err_msg=name)


def test_anew_it_starts_over_and_replaces_the_model_once_it_has_learned(
    config: Config, served: Manifest, pairs: Pairs
) -> None:
    report = drain(config, ANEW)

    assert report["events"]["impressions"] == sum(len(block) for block, _ in pairs[:9])
    now = current(config)
    assert (now.lineage, now.version) == (report["lineage"], report["version"])
    assert now.lineage.partition(".")[0] != served.lineage
    assert now.version > 0


def test_anew_without_a_step_nothing_is_published(config: Config, served: Manifest) -> None:
    report = run_train(
        config, report=None, drain=False, skip_lost=False, should_stop=lambda: True, without_checkpoint=ANEW
    )

    assert report is not None
    assert report.version == 0
    assert current(config) == served


def test_once_answered_the_question_is_not_asked_again(config: Config, served: Manifest) -> None:
    run_train(config, report=None, drain=False, skip_lost=False, should_stop=lambda: True, without_checkpoint=ANEW)

    drain(config)

    assert current(config).version > 0


def test_in_an_empty_namespace_nothing_is_asked(config: Config, pairs: Pairs) -> None:
    fill_servers(config, pairs[:9], "arrow")

    assert drain(config)["version"] == current(config).version > 0


def test_a_snapshot_that_cannot_be_read_is_in_service_too(config: Config, served: Manifest) -> None:
    with connect(config.feature_store.redis_url, 20.0) as client:
        manifests = f"{{{config.feature_store.namespace}}}:snapshots:manifests"
        client.hset(manifests, mapping=dict.fromkeys(client.hkeys(manifests), b"junk"))

    with pytest.raises(ServingWithoutCheckpoint, match=r"a snapshot .* is in service"):
        drain(config)
    with pytest.raises(SnapshotError, match=r"--from-snapshot: .* expected a snapshot that can be read"):
        drain(config, FROM_SNAPSHOT)
    with pytest.raises(SnapshotError):
        current(config)
    assert drain(config, ANEW)["version"] == current(config).version > 0


def test_both_answers_at_once_are_none() -> None:
    with pytest.raises(ValueError, match="--from-snapshot --anew: expected at most one"):
        WithoutCheckpoint(from_snapshot=True, anew=True)
