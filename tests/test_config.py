"""Configuration: files, overrides, errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ROOT
from tunix_mlflow.cli.arguments import parse
from tunix_mlflow.config.identity import config_digest, flatten, to_json
from tunix_mlflow.config.load import from_json, load_config
from tunix_mlflow.config.schema import Config
from tunix_mlflow.errors import ConfigError

PRESETS = ROOT / "projects" / "configs"


@pytest.mark.parametrize("preset", sorted(p.stem for p in PRESETS.glob("*.yaml")))
def test_presets_are_valid(preset: str) -> None:
    """Every preset loads, by its name."""
    loaded = load_config(preset, {}, PRESETS)
    assert loaded != Config()
    assert (
        loaded.dataset
        or loaded.lora.rank
        or preset in (*("cpu-fast", "pretrained", "shape-s", "shape-m"),)
    )


def test_overrides_come_last_and_extends_first(tmp_path: Path) -> None:
    """base < file < command line."""
    (tmp_path / "base.yaml").write_text("seed: 1\ntraining: {steps: 10, batch_size: 2}\n")
    (tmp_path / "top.yaml").write_text("extends: base.yaml\ntraining: {steps: 20}\n")
    config = load_config(
        tmp_path / "top.yaml", {"optimizer.learning_rate": "1e-3", "seed": "7"}, PRESETS
    )
    assert (config.seed, config.training.steps, config.training.batch_size) == (7, 20, 2)
    assert config.optimizer.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"training.stepz": "1"}, "unknown key training.stepz (on the command line); did you"),
        ({"nonsense": "1"}, "unknown key nonsense"),
        ({"trainning.steps": "1"}, "unknown key trainning (on the command line); did you mean"),
        ({"training.steps": "many"}, "training.steps: expected int, got 'many'"),
        ({"training.steps": "0"}, "training.steps: expected int >= 1, got '0'"),
        ({"training": "5"}, "training (on the command line) must be a section"),
        ({"optimizer.learning_rate": "inf"}, "optimizer.learning_rate: expected a finite"),
        ({"optimizer.learning_rate": "nan"}, "optimizer.learning_rate: expected float > 0.0"),
        ({"optimizer.name": "sgd"}, "optimizer.name: invalid enum value"),
        ({"model.heads": "3"}, "model.heads=3 must be a multiple of model.kv_heads=2"),
        ({"training.microbatch_size": "3"}, "must be a multiple of training.microbatch_size=3"),
        ({"device": "gpu:x"}, "device: expected auto, cpu, gpu or tpu"),
        ({"device": "cpu:\u00b2"}, "device: expected auto, cpu, gpu or tpu"),
        ({"promotion.thresholds.f@1": "0.5"}, "promotion.thresholds"),
        ({"training.steps": "null"}, "training.steps: expected int, got None"),
        ({"device": "cuda"}, "device: expected auto, cpu, gpu or tpu"),
    ],
)
def test_errors_name_the_key(overrides: dict[str, str], expected: str) -> None:
    """A wrong value is one line that names the key and what was given."""
    with pytest.raises(ConfigError) as caught:
        load_config("golden-v2", overrides, PRESETS)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [", "cannot be read as YAML"),
        ("- 1", "must hold a mapping"),
        ("1: 2", "must hold a mapping"),
        ("extends: self.yaml", "extends itself"),
        ("extends: [a]", "must name one file"),
        ("extends: absent.yaml", "no configuration"),
        ("training: {steps: 5}\ntraining: {batch_size: 4}", "the key 'training' is given twice"),
        ("{a: " * 3000, "cannot be read as YAML"),
        ("seed: -1", "seed: expected int >= 0"),
        ("training: {steps: 1.5}", "training.steps: expected int"),
        ("!!python/object/apply:os.system ['true']", "cannot be read as YAML"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, expected: str) -> None:
    """A wrong file is named, and never executed."""
    path = tmp_path / "self.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=expected) as caught:
        load_config(path, {}, PRESETS)
    assert "\n" not in str(caught.value)


def test_missing_configuration_lists_the_presets() -> None:
    """A typo in the preset's name shows the names there are."""
    with pytest.raises(ConfigError, match=r"column-addition, cpu-fast, .*golden-v2"):
        load_config("golden", {}, PRESETS)


def test_json_round_trip_and_digest() -> None:
    """config.json reads back to the same configuration; the digest sees every key."""
    config = load_config("column-addition", {}, PRESETS)
    assert from_json(to_json(config), "test") == config
    other = load_config("column-addition", {"seed": "1"}, PRESETS)
    assert config_digest(other) != config_digest(config)


def test_a_preset_can_be_extended(tmp_path: Path) -> None:
    """By its name, where no file of that name lies beside."""
    (tmp_path / "mine.yaml").write_text("extends: golden-v2\nseed: 5\n")
    config = load_config(tmp_path / "mine.yaml", {}, PRESETS)
    assert (config.seed, config.dataset) == (5, "golden-v2")


@pytest.mark.parametrize(
    "argv",
    [
        ["golden-v2", "training.steps=3", "dataset=x-v1"],
        ["--config", "golden-v2", "--training.steps", "3", "--dataset", "x-v1"],
        ["--training.steps=3", "dataset=x-v1", "--config=golden-v2"],
    ],
)
def test_three_spellings_of_a_command_line(argv: list[str]) -> None:
    """Our own words and those that `mlflow run` hands on mean the same."""
    arguments = parse(argv)
    assert arguments.config == "golden-v2"
    assert arguments.overrides == {"training.steps": "3", "dataset": "x-v1"}


@given(
    st.lists(
        st.text(max_size=20)
        | st.sampled_from(["--", "--a", "a=1", "=", "--=", "seed=1", "training.steps=", "--seed"])
    )
)
def test_any_command_line_is_read_or_refused(argv: list[str]) -> None:
    """No words make anything but a configuration or a ConfigError of one line."""
    try:
        parse(argv).load("golden-v2")
    except ConfigError as error:
        assert str(error)


@given(
    st.sampled_from(sorted(flatten(Config()))) | st.text(max_size=12),
    st.text(max_size=12) | st.floats().map(str) | st.integers().map(str),
)
def test_any_override_is_read_or_refused(key: str, value: str) -> None:
    """No value makes anything but a valid configuration or a ConfigError."""
    try:
        config = load_config(None, {key: value}, PRESETS)
    except ConfigError:
        return
    assert from_json(to_json(config), "test") == config


@pytest.mark.parametrize("name", ["x" * 300, "a\x00b", "."])
def test_a_name_no_file_can_have(name: str) -> None:
    """Too long, with a NUL, a folder: not a configuration."""
    with pytest.raises(ConfigError, match="no configuration"):
        load_config(name, {}, PRESETS)


def test_null_is_none() -> None:
    """As in YAML."""
    config = load_config("column-addition", {"data.sequence_length": "null"}, PRESETS)
    assert config.data.sequence_length is None
    assert load_config(None, {"tracking.experiment": "null"}, PRESETS).tracking.experiment is None
