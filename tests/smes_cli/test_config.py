"""The configuration file: its defaults, what it refuses, and variables over it."""

from dataclasses import replace
from pathlib import Path

import pytest

from smes.rankers.sparse.config import SmesConfig
from smes_cli.config import STARTER, Config, load_config


def write(folder: Path, text: str) -> Path:
    path = folder / "smes.yaml"
    path.write_text(text)
    return path


def test_the_starter_is_the_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, STARTER), {})
    assert config.schema == "synthetic"
    assert config.trainer.checkpoint.directory == Path("checkpoints")
    checkpoint = replace(config.trainer.checkpoint, directory=None)
    assert replace(config, schema=None, trainer=replace(config.trainer, checkpoint=checkpoint)) == Config()


def test_an_empty_file_and_no_file_are_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(None, {}) == Config()
    assert load_config(write(tmp_path, ""), {}) == Config()


def test_smes_yaml_in_the_working_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "schema: kuairand")
    assert load_config(None, {}).schema == "kuairand"


def test_variables_override_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "event_log: {kind: redis, partitions: 3}")
    variables = {
        "SMES_EVENT_LOG__KIND": "kafka",
        "SMES_MODEL__SMES__NUM_EXPERTS": "8",
        "SMES_SCORER__FUSION_WEIGHTS": "{click: 2}",
        "PATH": "elsewhere",
    }
    config = load_config(path, variables)
    assert (config.event_log.kind, config.event_log.partitions) == ("kafka", 3)
    assert config.model.smes.num_experts == 8
    assert config.scorer.fusion_weights == {"click": 2}


def test_the_papers_form_alone_is_enough(tmp_path: Path) -> None:
    smes = load_config(write(tmp_path, "model: {smes: {form: paper}}"), {}).model.smes
    assert smes == SmesConfig(form="paper")
    assert (smes.num_experts, smes.num_shared, smes.num_group, smes.num_adaptive) == (16, 2, 0, 1)
    assert (smes.expert_dims, smes.router_rank, smes.router_input, smes.router_norm) == ((64,), None, "encoder", "none")
    given = load_config(write(tmp_path, "model: {smes: {form: paper, num_experts: 256, expert_dims: [32]}}"), {})
    assert given.model.smes == SmesConfig(form="paper", num_experts=256, expert_dims=(32,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("event_log: {kin: kafka}", r"smes\.yaml: event_log\.kin: 'kafka' is an unknown key, expected one of kind, "),
        ("event_log: {kind: pulsar}", r"event_log\.kind: 'pulsar', expected otherwise: input should be 'redis' or"),
        ("trainer: {checkpoint: {keep: 0}}", r"trainer\.checkpoint: keep 0, expected at least 1"),
        ("trainer: {seed: soon}", r"trainer\.seed: 'soon', expected otherwise: input should be a valid integer"),
        (
            "model: {smes: {num_experts: 1}}",
            r"model\.smes: .*num_shared 0, num_group 4 and .*at most num_experts \(1\)",
        ),
        (
            "model: {smes: {form: paper, num_group: 4}}",
            r"model\.smes: smes\.num_group: 4, expected 0 in the paper's form",
        ),
        ("model: {ranker: magic}", r"ranker: 'magic', expected one of"),
        ("- 1", r"expected a mapping of keys to values, got list"),
        ("a: [", r"expected YAML"),
    ],
)
def test_refuses_in_one_line_with_file_key_value_and_what_was_expected(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_config(write(tmp_path, text), {})
    assert "\n" not in str(caught.value)
    assert "smes.yaml" in str(caught.value)


def test_a_bad_variable_is_named() -> None:
    with pytest.raises(ValueError, match=r"with SMES_TRAINER__SEED: trainer\.seed: 'x', expected otherwise"):
        load_config(None, {"SMES_TRAINER__SEED": "x"})
    with pytest.raises(ValueError, match="SMES_SCHEMA__X: 'schema' is a value, expected a section"):
        load_config(None, {"SMES_SCHEMA": "kuairand", "SMES_SCHEMA__X": "1"})


def test_which_schema(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a schema file: name one with --schema"):
        Config().schema_file(tmp_path)
    assert Config(schema="kuairand").schema_file().name == "kuairand"
    (tmp_path / "log_standard_x.csv").touch()
    assert Config().schema_file(tmp_path).name == "kuairand"
    (tmp_path / "w.truth.parquet").touch()
    assert Config().schema_file(tmp_path / "w.parquet").name == "synthetic"
    with pytest.raises(ValueError, match=r"missing\.yaml: expected a readable file"):
        Config(schema=str(tmp_path / "missing.yaml")).schema_file()
