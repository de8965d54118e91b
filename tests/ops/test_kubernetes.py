"""The Kubernetes manifests: valid by Kubernetes' own schemas, fitting to each other, and to what the pods run.

No cluster runs here. What these tests cannot show is said in docs/operate/kubernetes.md.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from smes_cli.config import Config, load_config
from smes_scorer.app import LIVE_PATH, READY_PATH
from tests.ops.expressions import OPS

FOLDER = OPS / "kubernetes"
VERSIONS = ("1.30", "1.37")
Manifest = dict[str, Any]


def kustomization() -> Manifest:
    found: Manifest = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    return found


def manifests() -> list[Manifest]:
    return [each for name in kustomization()["resources"] for each in yaml.safe_load_all((FOLDER / name).read_text())]


def named(kind: str) -> dict[str, Manifest]:
    return {each["metadata"]["name"]: each for each in manifests() if each["kind"] == kind}


def workloads() -> Iterator[tuple[Manifest, Manifest, Manifest]]:
    """Each workload with its pods and their container."""
    for each in [*named("StatefulSet").values(), *named("Deployment").values()]:
        pod = each["spec"]["template"]
        (container,) = pod["spec"]["containers"]
        yield each, pod, container


@pytest.fixture
def config() -> Config:
    return load_config(FOLDER / "smes.yaml")


def test_every_file_of_the_folder_is_part_of_it() -> None:
    parts = {*kustomization()["resources"], "kustomization.yaml", *kustomization()["configMapGenerator"][0]["files"]}
    assert {path.name for path in FOLDER.iterdir()} == parts


@pytest.mark.parametrize("version", VERSIONS)
def test_the_manifests_are_what_kubernetes_takes(version: str) -> None:
    for manifest in manifests():
        kubernetes_validate.validate(manifest, version, strict=True)
    scorer = named("Deployment")["smes-scorer"]
    scorer["spec"]["replica"] = 3  # the check can fail
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(scorer, version, strict=True)


def test_selectors_and_claims_name_what_is_there() -> None:
    labels = [pod["metadata"]["labels"] for _, pod, _ in workloads()]
    for workload, pod, _ in workloads():
        assert workload["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    for kind in ("Service", "PodDisruptionBudget"):
        for each in named(kind).values():
            selector = each["spec"]["selector"]
            assert selector.get("matchLabels", selector) in labels, each["metadata"]["name"]
    (trainer,) = named("StatefulSet").values()
    assert trainer["spec"]["serviceName"] in named("Service")
    for _, pod, container in workloads():
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in named("PersistentVolumeClaim")
            if "configMap" in volume:
                assert volume["configMap"]["name"] == kustomization()["configMapGenerator"][0]["name"]
        assert container["image"] == kustomization()["images"][0]["name"]


def test_ports_and_probes_are_those_of_the_processes(config: Config) -> None:
    for _, pod, container in workloads():
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports["http"] == (config.scorer.port if container["name"] == "scorer" else config.trainer.http.port)
        for name, probe in container.items():
            if name.endswith("Probe"):
                path = READY_PATH if name == "readinessProbe" else LIVE_PATH
                assert probe["httpGet"] == {"path": path, "port": "http"}, name
        for service in named("Service").values():
            if service["spec"]["selector"] == pod["metadata"]["labels"]:
                assert {p.get("targetPort", p["name"]) for p in service["spec"]["ports"]} <= ports.keys()


def test_the_ranks_find_each_other(config: Config) -> None:
    (trainer,) = named("StatefulSet").values()
    (_, _, container) = next(each for each in workloads() if each[0]["kind"] == "StatefulSet")
    (service,) = (each for name, each in named("Service").items() if name == trainer["spec"]["serviceName"])
    options = dict(part.lstrip("-").split("=", 1) for part in container["command"] if "=" in part)
    host, port = options["rdzv-endpoint"].split(":")
    assert host == f"{trainer['metadata']['name']}-0.{service['metadata']['name']}"
    assert int(port) in [each["containerPort"] for each in container["ports"]]
    assert service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["clusterIP"] == "None"
    ranks = {each["name"]: each.get("value") for each in container["env"]}["RANKS"]
    assert options["nnodes"] == "$(RANKS)"
    assert int(ranks) == trainer["spec"]["replicas"] <= config.event_log.partitions


def test_the_pods_commands_and_paths_are_ours(config: Config) -> None:
    commands = {container["name"]: container.get("args") or container["command"] for _, _, container in workloads()}
    written = (OPS.parent / "docs" / "reference" / "cli.md").read_text()
    for name, command in commands.items():
        assert re.search(rf"^#+ `?smes {command[-1]}\b", written, re.MULTILINE), name
        assert f"--config=/etc/smes/{kustomization()['configMapGenerator'][0]['files'][0]}" in command
    mounts = {mount["mountPath"] for _, _, container in workloads() for mount in container["volumeMounts"]}
    secrets = [config.event_log.kafka_access.password, config.feature_store.redis_access.password]
    files = [Path(str(re.findall(r"/[\w./-]+", repr(secret))[0])) for secret in secrets]
    assert {str(path.parent) for path in files} <= mounts
    assert str(config.trainer.checkpoint.directory) in mounts
    explained = (OPS.parent / "docs" / "operate" / "kubernetes.md").read_text()
    assert all(path.name in explained for path in files)


def test_no_pod_has_rights_that_it_does_not_need() -> None:
    for workload, pod, container in workloads():
        name = workload["metadata"]["name"]
        assert pod["spec"]["securityContext"]["runAsNonRoot"], name
        assert container["securityContext"]["readOnlyRootFilesystem"], name
        assert container["securityContext"]["capabilities"]["drop"] == ["ALL"], name
        assert not container["securityContext"]["allowPrivilegeEscalation"], name
        assert not pod["spec"]["automountServiceAccountToken"], name
        assert container["resources"]["limits"]["memory"], name
