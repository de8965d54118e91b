"""The compose file, what stands beside it, and the image, against configuration, commands, Kafka and the specification.

None of it starts a container: ops/compose-test.sh does.
"""

import importlib.util
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema.validators import validator_for

from smes_cli.config import load_config
from tests.running import until
from tests.test_repository import PYPROJECT, ROOT, parse, shell_lines

COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
OURS = ("trainer", "scorer", "simulator", "console")
_INTERPOLATION = re.compile(r"\$\{(\w+):[-?]([^{}]*)\}")


def interpolated(value: Any) -> str:
    """A value as compose hands it on when none of the caller's variables is set."""
    return _INTERPOLATION.sub(lambda found: found[2], str(value)).replace("$$", "$")


def environment(service: str) -> dict[str, str]:
    return {name: interpolated(v) for name, v in COMPOSE["services"][service].get("environment", {}).items()}


def test_compose_file_fits_the_specification() -> None:
    found = importlib.util.find_spec("check_jsonschema")
    assert found is not None
    assert found.submodule_search_locations
    [package] = found.submodule_search_locations
    schema = json.loads((Path(package) / "builtin_schemas/vendor/compose-spec.json").read_text())
    validator = validator_for(schema)(schema)
    assert [f"{list(e.path)}: {e.message}" for e in validator.iter_errors(COMPOSE)] == []
    wrong = {**COMPOSE, "services": {"kafka": {**COMPOSE["services"]["kafka"], "helthcheck": {}}}}
    assert not validator.is_valid(wrong)


def test_compose_services_refer_to_what_is_there() -> None:
    services = COMPOSE["services"]
    ours, others = set(OURS), {"kafka", "redis", "prometheus", "grafana"}
    assert set(services) == ours | others
    used = set()
    for name, service in services.items():
        for target, how in service.get("depends_on", {}).items():
            assert target in services, name
            assert how["condition"] != "service_healthy" or "healthcheck" in services[target], f"{name} on {target}"
        used |= {interpolated(volume).partition(":")[0] for volume in service.get("volumes", [])}
        assert all(name in service for name in ("logging", "cap_drop", "security_opt", "mem_limit")), name
        assert service["restart"] == ("on-failure" if name == "simulator" else "unless-stopped"), name
    folders = {name for name in used if name.startswith("./")}
    assert used - folders == set(COMPOSE["volumes"])
    assert [folder for folder in folders if not (ROOT / folder).is_dir()] == []
    images = [interpolated(service["image"]) for name, service in services.items() if name in others]
    assert all(re.fullmatch(r"[\w/]+:v?\d[\d.]*", image) for image in images), "images are pinned"
    always = {volume.partition(":")[0] for service in services.values() for volume in service.get("volumes", [])}
    assert set(COMPOSE["volumes"]) <= always, (
        "a volume that LOG_DIR takes out of use is not removed by `down --volumes`"
    )


def test_files_beside_the_compose_file_change_what_it_has() -> None:
    base = COMPOSE["services"]
    passwords, gpu = (
        yaml.safe_load((ROOT / f"ops/docker/{name}.yml").read_text())["services"] for name in ("passwords", "gpu")
    )
    assert passwords.keys() == base.keys() - {"prometheus", "grafana"}
    command = base["redis"]["command"]
    assert passwords["redis"]["command"][: len(command)] == command
    listeners = base["kafka"]["environment"]["KAFKA_LISTENER_SECURITY_PROTOCOL_MAP"]
    closed = re.sub(r"(INTERNAL|HOST):PLAINTEXT", r"\1:SASL_PLAINTEXT", listeners)
    assert passwords["kafka"]["environment"]["KAFKA_LISTENER_SECURITY_PROTOCOL_MAP"] == closed
    for name in OURS:
        variables = environment(name) | {n: interpolated(v) for n, v in passwords[name]["environment"].items()}
        config = load_config(None, variables)
        places = [config.feature_store.redis_access.password]
        places += [config.event_log.kafka_access.password] if name != "scorer" else []
        assert all(place is not None and place.env in variables for place in places), name
    assert load_config(None, environment("trainer") | gpu["trainer"]["environment"]).trainer.device == "cuda"


def test_a_container_that_is_refused_waits_and_is_not_started_again(tmp_path: Path) -> None:
    script = str(ROOT / "ops/docker/stay-when-refused.sh")
    assert subprocess.run([script, "sh", "-c", "exit 1"], check=False).returncode == 1
    assert subprocess.run([script, "true"], check=False).returncode == 0

    with subprocess.Popen([script, "sh", "-c", "exit 2"], stderr=subprocess.PIPE, text=True) as refused:
        assert refused.stderr is not None
        assert "this container waits" in refused.stderr.readline()
        refused.terminate()
        assert refused.wait(10) == 2

    # A command that has to finish something is waited for, and its exit code is the container's.
    begun = tmp_path / "begun"
    finish = f"trap 'sleep 0.2; exit 7' TERM; touch {begun}; while :; do sleep 0.05; done"
    slow = subprocess.Popen([script, "sh", "-c", finish])
    until(begun.exists)
    slow.terminate()
    assert slow.wait(10) == 7


@pytest.mark.parametrize("service", OURS)
def test_compose_runs_commands_and_keys_that_exist(
    service: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    variables = environment(service)
    config = load_config(None, variables)
    assert config.event_log.kind == "kafka"
    assert f"INTERNAL://{config.event_log.kafka_bootstrap}" in environment("kafka")["KAFKA_ADVERTISED_LISTENERS"]
    assert config.feature_store.redis_url == "redis://redis:6379/0"
    assert config.schema_file().name == "synthetic"
    command = COMPOSE["services"][service]["command"]
    entrypoint = COMPOSE["services"][service]["entrypoint"]
    assert entrypoint[0] == "stay-when-refused"
    if service != "simulator":
        assert entrypoint[1:] == ["smes"]
        expected = {"trainer": "smes train", "scorer": "smes serve", "console": "smes console"}
        assert parse([interpolated(word) for word in command]) == expected[service]
        return
    script = interpolated(command[0]).replace("/synthetic/", f"{tmp_path}/")
    for name in ("LOG", "IMPRESSIONS", "RATE"):
        script = script.replace(f'"${name}"', variables[name])
    assert [parse(line) for line in shell_lines(script)] == ["smes synthesize", "smes features load", "smes replay"]
    subprocess.run(["sh", "-n", "-c", script], check=True)


def test_compose_health_checks_look_where_the_processes_are() -> None:
    config = load_config(None, environment("scorer"))
    http, services = config.trainer.http, COMPOSE["services"]
    places = {
        "trainer": (http.port, "/health/ready"),
        "scorer": (config.scorer.port, "/health/ready"),
        "console": (config.console.port, "/"),
    }
    for service, (port, path) in places.items():
        *_, keep_off_the_path, option, code = services[service]["healthcheck"]["test"]
        assert (keep_off_the_path, option) == ("-P", "-c")
        compile(code, "healthcheck", "exec")
        assert f"'http://127.0.0.1:{port}{path}'" in code
        ports = services[service].get("ports")
        assert ports == (None if service == "trainer" else [f"127.0.0.1:{port}:{port}"]), service
    hosts = {http.host, config.scorer.host, config.console.host}
    assert hosts == {"0.0.0.0"}, "other containers reach them"
    assert config.console.trainer_url == f"http://trainer:{http.port}"
    assert config.console.scorer_url == f"http://scorer:{config.scorer.port}"
    for folder in (config.trainer.checkpoint.directory, config.trainer.history.directory):
        assert str(folder).startswith("/data/")
    for service in ("trainer", "console"):
        assert any(volume.split(":")[1] == "/data" for volume in services[service]["volumes"])


def test_kafka_takes_the_settings_of_the_compose_file(kafka_home: Path, tmp_path: Path) -> None:
    """The image makes server.properties of its variables; Kafka's own storage tool reads that file and checks it."""

    def format_storage(settings: dict[str, str], name: str) -> subprocess.CompletedProcess[str]:
        # The image's rule: without the prefix, in small letters, _ is a dot.
        names = {n.removeprefix("KAFKA_").lower().replace("_", "."): v for n, v in settings.items() if "KAFKA_" in n}
        file = tmp_path / f"{name}.properties"
        file.write_text("".join(f"{n}={v}\n" for n, v in (names | {"log.dirs": str(tmp_path / name)}).items()))
        java = ["java", "-XX:TieredStopAtLevel=1", "-cp", f"{kafka_home / 'libs'}/*", "kafka.tools.StorageTool"]
        arguments = ["format", "-t", settings["CLUSTER_ID"], "-c", str(file)]
        return subprocess.run([*java, *arguments], check=False, capture_output=True, text=True, timeout=60)

    settings = environment("kafka")
    done = format_storage(settings, "full")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"cluster.id={settings['CLUSTER_ID']}" in (tmp_path / "full" / "meta.properties").read_text()
    without = {n: v for n, v in settings.items() if n != "KAFKA_CONTROLLER_LISTENER_NAMES"}
    assert format_storage(without, "partial").returncode != 0


def test_the_image_gets_every_package() -> None:
    packages = set(PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    files = {"pyproject.toml", "requirements.lock", "README.md", "LICENSE", "ops/docker/stay-when-refused.sh"}
    assert let_through == packages | files
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("COPY ")][-1] == "COPY . ./", "all that is let through"
    torch = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line.startswith("torch==")]
    assert len(torch) == 1
    assert "+" not in torch[0], "the Dockerfile appends which build it is"


def test_the_script_that_starts_the_stack_starts_what_is_there() -> None:
    scripts = [*ROOT.glob("ops/*.sh"), *ROOT.glob("ops/*/*.sh")]
    assert len(scripts) > 3
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
    text = (ROOT / "ops/compose-test.sh").read_text()
    [started] = re.findall(r"^services=\((.*)\)$", text, flags=re.MULTILINE)
    killed = re.search(r"# ---- killed.*?^for service in ([\w ]+); do$", text, flags=re.MULTILINE | re.DOTALL)
    assert killed is not None
    assert {*killed[1].split()} == {*started.split()}
    assert {*started.split(), "grafana"} == set(COMPOSE["services"])
    stand_ins = re.findall(r"\w+=([\w/]+:v?[\d.]+(?:-slim)?)", (ROOT / "ops/compose-test-engine.sh").read_text())
    pulled = {interpolated(COMPOSE["services"][name]["image"]) for name in ("kafka", "redis", "prometheus")}
    assert {*stand_ins} == pulled | {"python:3.11-slim"}
