"""The configuration file: its defaults, its errors, presets, and the variables that override it."""

from dataclasses import replace
from pathlib import Path

import pytest

from smes.model.config import ModelConfig, model_preset
from smes.rankers.sparse.config import smes_paper
from smes_cli.config import Config, load_config
from smes_cli.starter import STARTER

_SECONDS = ["poll_s", "redis_timeout_s", "entity_retry_s", "max_age_s"]
_SECONDS += [f"{what}_timeout_s" for what in ("header", "body", "request", "send")]


def write(folder: Path, text: str) -> Path:
    path = folder / "smes.yaml"
    path.write_text(text)
    return path


def model_of(folder: Path, text: str) -> ModelConfig:
    return load_config(write(folder, text), {}).model


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
        "SMES_MODEL__SMES__EXPERTS__NUM": "8",
        "SMES_SCORER__FUSION_WEIGHTS": "{click: 2}",
        "PATH": "elsewhere",
    }

    config = load_config(path, variables)

    assert (config.event_log.kind, config.event_log.partitions) == ("kafka", 3)
    assert config.model.smes.experts.num == 8
    assert config.scorer.fusion_weights == {"click": 2}


@pytest.mark.parametrize("name", ["default", "paper", "large"])
def test_a_preset_alone_is_that_model(tmp_path: Path, name: str) -> None:
    model = model_of(tmp_path, f"model: {{preset: {name}}}")

    assert model == model_preset(name)  # type: ignore[arg-type]  # one of its names


def test_the_preset_default_is_the_default() -> None:
    assert model_preset("default") == Config().model


def test_other_keys_change_a_preset_one_by_one(tmp_path: Path) -> None:
    text = "model: {preset: paper, embedding_dim: 4, smes: {num_adaptive: 2, experts: {num: 256, dims: [32]}}}"

    model = model_of(tmp_path, text)

    paper = smes_paper()
    experts = replace(paper.experts, num=256, dims=(32,))
    smes = replace(paper, num_adaptive=2, experts=experts)
    assert model == replace(model_preset("paper"), embedding_dim=4, smes=smes)


def test_a_mapping_of_names_replaces_that_of_the_preset(tmp_path: Path) -> None:
    text = "model: {preset: default, smes: {groups: {declared: {watching: [click, like]}}}}"

    assert model_of(tmp_path, text).smes.groups.declared == {"watching": ("click", "like")}


def test_a_variable_chooses_the_preset(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "model: {preset: default}"), {"SMES_MODEL__PRESET": "paper"})

    assert config.model == model_preset("paper")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("event_log: {kin: kafka}", "event_log.kin: 'kafka' is an unknown key, expected one of kind, "),
        ("model: {preset: paper, smes: {width: 1}}", "model.smes.width: 1 is an unknown key, expected one of encoder_"),
        ("event_log: {kind: pulsar}", "event_log.kind: 'pulsar', expected one of redis, kafka"),
        ("trainer: {checkpoint: {keep: 0}}", "trainer.checkpoint.keep: 0, expected at least 1"),
        ("trainer: {checkpoint: {interval_s: 0}}", "trainer.checkpoint.interval_s: 0, expected more than 0"),
        ("trainer: {seed: soon}", "trainer.seed: 'soon', expected an integer"),
        ("trainer: {threads: some}", "trainer.threads: 'some', expected an integer, at least 1, or null"),
        ("model: {wide: often}", "model.wide: 'often', expected true or false"),
        ("model: {smes: {experts: {dims: [12]}}}", "model.smes.experts.dims.0: 12, expected at least 8, a multiple of"),
        ("model: {smes: {trunk_input: both}}", "model.smes.trunk_input: 'both', expected one of raw, encoder"),
        ("model: {rare: {gradient_power: -1}}", "model.rare.gradient_power: -1, expected at least 0"),
        ("model: {rare: {gradient_limit: 0.5}}", "model.rare.gradient_limit: 0.5, expected at least 1"),
        ("model: {rare: {linear_prior: few}}", "model.rare.linear_prior: 'few', expected a number, at least 0"),
        ("model: {rare: {power: 1}}", "model.rare.power: 1 is an unknown key, expected one of gradient_power, "),
        ("model: {smes: 3}", "model.smes: 3, expected a mapping with the keys encoder_dims, "),
        ("scorer: {fusion_weights: {click: high}}", "scorer.fusion_weights.click: 'high', expected a number"),
        ("replay: {speed: fast}", "replay.speed: 'fast', expected a number, more than 0 or max"),
        ("replay: {rate: 5, speed: 2}", "replay.rate: 5.0 beside speed 2.0, expected one of them"),
        ("model: {preset: huge}", "model.preset: 'huge', expected one of default, paper, large"),
        ("model: {preset: [paper]}", "model.preset: "),
        ("model: {ranker: magic}", "model.ranker: 'magic', expected one of smes, home"),
        ("model: {ranker: magic, head_dim: -1}", "expected one of smes, home, mmoe, ple, shared_bottom, linear (and 1"),
        ("rows: {expire_after_s: .inf}", "rows.expire_after_s: inf, expected more than 0, at most 1000000000"),
        ("rows: {expire_after_s: 1e300}", "rows.expire_after_s: '1e300', expected more than 0, at most 1000000000"),
        ("rows: {shared_rows: 99999999999}", "rows.shared_rows: 99999999999, expected at least 0, at most 1048576"),
        ("rows: {counted_sightings: 100000000000000}", "rows.counted_sightings: 100000000000000, expected at least 1"),
        ("rows: {vocabularies: {user_id: {shared_rows: 1e20}}}", "rows.vocabularies.user_id.shared_rows: "),
        ("stream: {join: {wait: {click: .inf}}}", "expected one of immediate, window or more than 0"),
        ("stream: {join: {allowed_lateness_s: 1e300}}", "stream.join.allowed_lateness_s: '1e300', expected at least 0"),
        ("stream: {join: {remember_s: .inf}}", "stream.join.remember_s: inf, expected at least 0, at most 1000000000"),
        ("stream: {batch: {max_age_s: 1e300}}", "stream.batch.max_age_s: '1e300', expected more than 0, at most"),
        ("feature_store: {timeout_s: 1e12}", "feature_store.timeout_s: '1e12', expected more than 0, at most"),
        ("event_log: {connect_timeout_s: 1e12}", "event_log.connect_timeout_s: '1e12', expected more than 0"),
        (
            "trainer: {snapshot_interval_s: .inf}",
            "trainer.snapshot_interval_s: inf, expected more than 0, at most 1000000",
        ),
        ("optimizer: {learning_rate: .inf}", "optimizer.learning_rate: inf, expected a finite number, more than 0"),
        *(
            (f"scorer: {{{key}: 1e12}}", f"scorer.{key}: '1e12', expected more than 0, at most 1000000")
            for key in _SECONDS
        ),
        ("scorer: {shutdown_s: 1000000000000}", "scorer.shutdown_s: 1000000000000, expected at least 1, at most"),
        ("scorer: {entity_timeout_ms: 1000000000000}", "scorer.entity_timeout_ms: 1000000000000, expected at least 1"),
        ("rows: {admit_after: true}", "rows.admit_after: True, expected an integer, at least 1, at most 255"),
        ("rows: {expire_after_s: true}", "rows.expire_after_s: True, expected a number, more than 0"),
        (
            "rows: {vocabularies: {user_id: {budget: yes}}}",
            "rows.vocabularies.user_id.budget: True, expected an integer",
        ),
        (
            "stream: {join: {wait: {click: true}}}",
            "stream.join.wait.click: True, expected one of immediate, window or a",
        ),
        ("scorer: {fusion_weights: {click: true}}", "scorer.fusion_weights.click: True, expected a number"),
        ("scorer: {arms: {b: {held: 1, shadow: true}}}", "scorer.arms.b.held: 1, expected true or false"),
        ("optimizer: {betas: [0.9, false]}", "optimizer.betas.1: False, expected a number, at least 0, less than 1"),
        ("model: {preset: paper, wide: 1.0}", "model.wide: 1.0, expected true or false"),
        ("trainer: {gate: {enabled: 1}}", "trainer.gate.enabled: 1, expected true or false"),
        ("schema: synthetic\nstream: {join: {wait: {buy: 5}}}", "stream.join.wait: unknown tasks ['buy'], expected"),
        (
            "schema: synthetic\nrows: {vocabularies: {x: {}}}",
            "rows.vocabularies.x: no such vocabulary, expected one of",
        ),
        (
            "schema: synthetic\nscorer: {fusion_weights: {buy: 1}}",
            ": scorer.fusion_weights: 'buy', expected one of the",
        ),
        (
            "schema: synthetic\nmodel: {smes: {groups: {declared: {a: [buy]}}}}",
            "model.smes.groups.declared: unknown tasks ['buy'], expected names among",
        ),
        ("- 1", "expected a mapping of keys to values, got list"),
        ("a: [", "expected YAML"),
    ],
)
def test_a_mistake_is_one_line_with_file_key_value_and_what_was_expected(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        load_config(write(tmp_path, text), {})

    line = str(caught.value)
    assert message in line
    assert "\n" not in line
    assert line.startswith(str(tmp_path / "smes.yaml"))


def test_a_value_that_does_not_fit_another_is_named_by_its_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"smes\.yaml: model\.smes\.\w+.*: .*expected"):
        load_config(write(tmp_path, "model: {smes: {experts: {num: 1}}}"), {})


def test_a_bad_variable_is_named() -> None:
    with pytest.raises(ValueError, match=r"with SMES_TRAINER__SEED: trainer\.seed: 'x', expected an integer"):
        load_config(None, {"SMES_TRAINER__SEED": "x"})


def test_a_variable_below_a_value_is_refused() -> None:
    with pytest.raises(ValueError, match="SMES_SCHEMA__X: 'schema' is a value, expected a section"):
        load_config(None, {"SMES_SCHEMA": "kuairand", "SMES_SCHEMA__X": "1"})


def test_the_configured_schema_is_read() -> None:
    assert Config(schema="kuairand").schema_file().name == "kuairand"


def test_a_log_of_a_built_in_schema_is_recognized(tmp_path: Path) -> None:
    (tmp_path / "log_standard_x.csv").touch()
    (tmp_path / "w.truth.parquet").touch()

    assert Config().schema_file(tmp_path).name == "kuairand"
    assert Config().schema_file(tmp_path / "w.parquet").name == "synthetic"


def test_a_log_of_another_schema_needs_a_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a schema file: name one with --schema"):
        Config().schema_file(tmp_path)


def test_a_missing_schema_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing\.yaml: expected a readable file"):
        Config(schema=str(tmp_path / "missing.yaml")).schema_file()
