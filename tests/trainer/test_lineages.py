"""Which lineage a trainer publishes under: no version ever names two sets of weights."""

import pytest

from feature_store.manifest import Manifest
from tests.manifests import make_manifest
from trainer.lineages import lineage_to_publish, root_of


def manifest(name: str) -> Manifest:
    lineage, _, version = name.partition(":")
    return make_manifest(int(version), lineage)


@pytest.mark.parametrize(
    ("served", "listed"),
    [
        (None, []),
        ("line:26", ["line:26"]),
        ("line.fork:30", ["line.fork:30"]),
        ("line.fork:30", ["line:25", "line.fork:30"]),
        ("other:99", ["other:99"]),
    ],
)
def test_a_trainer_goes_on_in_its_lineage(served: str | None, listed: list[str]) -> None:
    found = lineage_to_publish("line", 26, manifest(served) if served else None, [manifest(name) for name in listed])

    assert found == "line"


@pytest.mark.parametrize(
    ("served", "listed"),
    [
        ("line:27", ["line:27"]),  # it died after its last checkpoint
        ("line.fork:30", ["line:27", "line.fork:30"]),  # so did the fork, before its first
        ("line.fork:30", ["line:26", "line.fork:30"]),
        ("other:99", ["line:26", "other:99"]),
    ],
)
def test_it_forks_where_its_next_versions_were_published_before(served: str, listed: list[str]) -> None:
    found = lineage_to_publish("line", 26, manifest(served), [manifest(name) for name in listed])

    assert found != "line"
    assert root_of(found) == "line"
    assert found not in {name.partition(":")[0] for name in listed}
