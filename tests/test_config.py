"""Configuration: files, overrides, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ROOT
from tunix_mlflow.config import identity
from tunix_mlflow.config.identity import config_digest, flatten, to_json, trajectory_digest
from tunix_mlflow.config.load import PRESETS, apply_overrides, from_json, load_config
from tunix_mlflow.config.schema import (
    SCHEMA_VERSION,
    Config,
    DataConfig,
    OptimizerConfig,
    RopeScaling,
    TrainingConfig,
)
from tunix_mlflow.errors import ConfigError


@pytest.mark.parametrize("preset", sorted(p.stem for p in PRESETS.glob("*.yaml")))
def test_presets_are_valid(preset: str) -> None:
    """Every preset loads, by its name."""
    loaded = load_config(preset, {})
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
    config = load_config(tmp_path / "top.yaml", {"optimizer.learning_rate": "1e-3", "seed": "7"})
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
        ({"optimizer.name": "sgd"}, "optimizer.name: expected adamw or muon, got 'sgd'"),
        ({"model.heads": "3"}, "model.heads=3 must be a multiple of model.kv_heads=2"),
        ({"training.microbatch_size": "3"}, "must be a multiple of training.microbatch_size=3"),
        ({"device": "gpu:x"}, "device: expected auto, cpu, gpu or tpu"),
        ({"device": "cpu:\u00b2"}, "device: expected auto, cpu, gpu or tpu"),
        ({"promotion.thresholds.f@1": "0.5"}, "promotion.thresholds"),
        ({"training.steps": "null"}, "training.steps: expected int, got None"),
        ({"device": "cuda"}, "device: expected auto, cpu, gpu or tpu"),
        ({"promotion.thresholds": "{a"}, "promotion.thresholds: expected object, got '{a'"),
        ({"data.validation_split": "train"}, "data.train_split and data.validation_split are both"),
    ],
)
def test_errors_name_the_key(overrides: dict[str, str], expected: str) -> None:
    """A wrong value is one line that names the key and what was given."""
    with pytest.raises(ConfigError) as caught:
        load_config("golden-v2", overrides)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [", "cannot be read as YAML"),
        ("- 1", "must contain a mapping"),
        ("1: 2", "must contain a mapping"),
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
        load_config(path, {})
    assert "\n" not in str(caught.value)


def test_missing_configuration_lists_the_presets() -> None:
    """A typo in the preset's name shows the names there are."""
    with pytest.raises(ConfigError, match=r"column-addition, cpu-fast, .*golden-v2"):
        load_config("golden", {})


def test_json_round_trip() -> None:
    """config.json reads back to the same configuration, and is a configuration file as well."""
    config = load_config("column-addition")
    assert from_json(to_json(config), "test") == config
    assert json.loads(to_json(config))["schema"] == SCHEMA_VERSION


def test_a_runs_config_json_is_a_configuration_file(tmp_path: Path) -> None:
    """A user begins another run with the configuration of one that exists."""
    config = load_config("column-addition", {"model.rope_scaling": "{kind: linear, factor: 2}"})
    (tmp_path / "config.json").write_bytes(to_json(config))
    assert load_config(tmp_path / "config.json") == config


def test_a_preset_can_be_extended(tmp_path: Path) -> None:
    """By its name, where no file of that name lies beside."""
    (tmp_path / "mine.yaml").write_text("extends: golden-v2\nseed: 5\n")
    config = load_config(tmp_path / "mine.yaml", {})
    assert (config.seed, config.dataset) == (5, "golden-v2")


@given(
    st.sampled_from(sorted(flatten(Config()))) | st.text(max_size=12),
    st.text(max_size=12) | st.floats().map(str) | st.integers().map(str),
)
def test_any_override_is_read_or_refused(key: str, value: str) -> None:
    """No value makes anything but a valid configuration or a ConfigError."""
    try:
        config = load_config(None, {key: value})
    except ConfigError:
        return
    assert from_json(to_json(config), "test") == config


@pytest.mark.parametrize("name", ["x" * 300, "a\x00b", "."])
def test_a_name_no_file_can_have(name: str) -> None:
    """Too long, with a NUL, a folder: not a configuration."""
    with pytest.raises(ConfigError, match="no configuration"):
        load_config(name, {})


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("data.sequence_length", "null", None),
        ("tracking.experiment", "null", None),
        ("tracking.experiment", "'null'", "null"),
        ("dataset", "2024-v1", "2024-v1"),
        ("dataset", "on", "on"),
        ("tracking.run_name", "a: b #1", "a: b #1"),
        ("tracking.run_name", "[draft] v1", "[draft] v1"),
        ("tracking.run_name", '"two words"', "two words"),
        ("optimizer.name", "muon", "muon"),
        ("optimizer.learning_rate", "1e-4", 1e-4),
        ("optimizer.learning_rate", 1e-4, 1e-4),
        ("training.fast_math", "true", True),
        ("training.fast_math", "yes", True),
        ("training.steps", 7, 7),
        ("data.evaluation_sets", "[a-v1, 2024-v1, on]", ("a-v1", "2024-v1", "on")),
        ("data.evaluation_sets", ["a-v1"], ("a-v1",)),
        ("promotion.thresholds", "{exact_match: 0.9}", {"exact_match": 0.9}),
        ("promotion.thresholds", {"f1": 0.2}, {"f1": 0.2}),
        ("promotion.thresholds.f1", "0.2", {"f1": 0.2}),
        ("model.rope_scaling", "{kind: linear, factor: 2}", RopeScaling(kind="linear", factor=2.0)),
        ("base", Path("model"), "model"),
    ],
)
def test_overrides_are_yaml_or_python_values(key: str, value: Any, expected: Any) -> None:
    """Numbers, lists, mappings and null as YAML has them; what is text stays the text."""
    found: Any = load_config(None, {key: value})
    for part in key.split(".")[:2]:
        found = getattr(found, part)
    assert found == expected


def test_a_section_given_as_a_mapping_keeps_its_other_keys() -> None:
    """As in a file that extends another."""
    config = load_config("golden-v2", {"training": "{steps: 3}"})
    assert (config.training.steps, config.training.eval_every_steps) == (3, 50)


class NewerData(DataConfig, frozen=True, kw_only=True):
    """The section data of a later version, with a new key that has a default."""

    new_key: int = 3


class NewerConfig(Config, frozen=True, kw_only=True):
    """The configuration of a later version, with a new section and a new key."""

    data: NewerData = NewerData()
    another: str | None = None


@pytest.mark.parametrize("preset", [None, "golden-v2", "qwen3-0.6b"])
def test_a_new_key_with_a_default_changes_no_digest(preset: str | None) -> None:
    """In a copy of the schema with more keys, every digest is as before; their values count."""
    before = load_config(preset, {"seed": 3, "data.packing": False})
    after = msgspec.convert(msgspec.to_builtins(before), NewerConfig)
    assert config_digest(after) == config_digest(before)
    assert trajectory_digest(after) == trajectory_digest(before)
    changed = msgspec.structs.replace(after, data=NewerData(new_key=4, packing=False))
    assert config_digest(changed) != config_digest(before)
    assert trajectory_digest(changed) != trajectory_digest(before)


def test_a_run_made_before_a_key_existed_is_read() -> None:
    """Its config.json has no such key: it takes the default, and may continue."""
    tree = json.loads(to_json(load_config("golden-v2")))
    del tree["training"]["fast_math"], tree["promotion"]
    config = from_json(json.dumps(tree).encode(), "config.json")
    assert config == load_config("golden-v2")
    longer = apply_overrides(config, {"training.steps": "400"})
    assert identity.differences(config, longer) == []
    assert trajectory_digest(longer) == trajectory_digest(config)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"schema": SCHEMA_VERSION + 1}, "newer version wrote it"),
        ({"new_section": {}}, "has the key new_section, which this version does not know: a newer"),
        ({"data": {"new_key": 3}}, "has the key data.new_key, which this version does not know"),
        ({"schema": "x"}, "schema: expected a schema version, got 'x'"),
        ({"schema": True}, "schema: expected a schema version"),
    ],
)
def test_a_newer_configuration_is_refused(change: dict[str, Any], expected: str) -> None:
    """A key or a schema version that this version does not know is named, and never dropped."""
    tree = json.loads(to_json(Config())) | change
    with pytest.raises(ConfigError, match=expected):
        from_json(json.dumps(tree).encode(), "config.json")


def test_json_without_a_schema_version_is_no_configuration() -> None:
    """So that no other JSON is taken for one."""
    with pytest.raises(ConfigError, match="it has no schema version"):
        from_json(b"{}", "config.json")


def defaults(config: Config) -> dict[str, Any]:
    """Every default of a schema, those of an optional section too."""
    scaling = msgspec.to_builtins(RopeScaling(kind="linear", factor=1.0))
    optional = {f"model.rope_scaling.{key}": value for key, value in scaling.items()}
    flat: dict[str, Any] = json.loads(msgspec.json.encode(flatten(config) | optional))
    return flat


def changed_defaults(config: Config) -> list[str]:
    """Keys whose default is not the one that is frozen for SCHEMA_VERSION."""
    path = ROOT / "tests" / "golden" / f"config-defaults-v{SCHEMA_VERSION}.json"
    frozen = json.loads(path.read_text())
    now = defaults(config)
    return [key for key, value in frozen.items() if key not in now or now[key] != value]


def test_the_defaults_of_a_schema_version_are_frozen() -> None:
    """A changed default needs a new SCHEMA_VERSION and its file; a new key a line in this one's."""
    assert changed_defaults(Config()) == []
    path = ROOT / "tests" / "golden" / f"config-defaults-v{SCHEMA_VERSION}.json"
    assert set(json.loads(path.read_text())) == set(defaults(Config()))


def test_a_changed_default_is_noticed() -> None:
    """The test above can fail."""

    class Changed(Config, frozen=True, kw_only=True):
        training: TrainingConfig = TrainingConfig(steps=300)

    assert changed_defaults(Changed()) == ["training.steps"]


@pytest.mark.parametrize(
    ("overrides", "same"),
    [
        ({"tracking.run_name": "x", "tracking.offline": "true"}, True),
        ({"limits.steps": "5", "checkpoints.keep_last": "9"}, True),
        ({"device": "gpu:1"}, False),
        ({"base": "elsewhere"}, False),
        ({"seed": "1"}, False),
        ({"training.steps": "1"}, False),
    ],
)
def test_what_the_configuration_digest_covers(overrides: dict[str, str], same: bool) -> None:
    """Where a run is recorded and which checkpoints stay is outside; what changes it is inside."""
    before, after = load_config("golden-v2"), load_config("golden-v2", overrides)
    assert (config_digest(after) == config_digest(before)) is same


def test_places_are_outside_the_configuration_digest() -> None:
    """The same device kind by another index, the same base in another folder."""
    configs = [load_config(None, {"device": f"gpu:{n}", "base": f"folder{n}"}) for n in (0, 1)]
    assert len({config_digest(config) for config in configs}) == 1


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"training.steps": "400", "tracking.key": "x", "mesh.data": "2"}, []),
        ({"data.leakage": "record", "training.save_every_minutes": "5"}, []),
        ({"seed": "1"}, ["seed: 0, now 1"]),
        ({"data.validation_split": "dev"}, ["data.validation_split: validation, now dev"]),
        ({"optimizer.name": "adamw"}, ["optimizer.name: muon, now adamw"]),
    ],
)
def test_what_may_change_when_a_run_is_resumed(
    overrides: dict[str, str], expected: list[str]
) -> None:
    """What determines the parameters may not; the digest agrees with the list."""
    before = load_config("golden-v2")
    after = apply_overrides(before, overrides)
    assert identity.differences(before, after) == expected
    assert (trajectory_digest(before) == trajectory_digest(after)) is (expected == [])


def test_non_defaults() -> None:
    """What was set, by dotted key; a mapping as a whole."""
    config = load_config(
        None,
        {
            "optimizer.name": "muon",
            "promotion.thresholds": {"exact_match": 0.5, "f1": 0.2},
            "model.rope_scaling": {"kind": "linear", "factor": 2},
        },
    )
    assert identity.non_defaults(config) == {
        "model.rope_scaling.kind": "linear",
        "model.rope_scaling.factor": 2.0,
        "optimizer.name": "muon",
        "promotion.thresholds.exact_match": 0.5,
        "promotion.thresholds.f1": 0.2,
    }
    assert identity.non_defaults(Config(optimizer=OptimizerConfig())) == {}
