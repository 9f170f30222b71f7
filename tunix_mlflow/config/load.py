"""Read a configuration: YAML files, what they extend, and dotted overrides.

A file may name another in ``extends:``; overrides (``training.steps=200``) come last. Unknown keys,
wrong types and values out of range are a ConfigError that names the key.

These functions of the package turn one Config into another, and no others:

- :func:`apply_overrides`: with some keys set anew, when a run is resumed.
- :func:`inherit_auto`: keys that are null take the value that an earlier part of the run chose.
- ``training.resolve.with_base_shape``: with the model shape of a pretrained base.
- ``training.resolve.with_length``: with the sequence length that the data needs.
- ``training.resolve.resolve_auto``: the other null keys, by the data and the device.
- ``tracking.artifacts.anchored``: with `base` as an absolute path.
"""

from __future__ import annotations

import difflib
import itertools
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml
from msgspec import Struct

from tunix_mlflow import paths
from tunix_mlflow.config.identity import flatten
from tunix_mlflow.config.schema import SCHEMA_VERSION, Config
from tunix_mlflow.errors import ConfigError

PRESETS = paths.project_root() / "projects" / "configs"
"""The folder of the presets."""


def load_config(
    source: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    presets: Path = PRESETS,
) -> Config:
    """Return the configuration of a file or preset, with overrides.

    Args:
        source: a YAML file, or the name of a preset, or None for the defaults.
        overrides: dotted key -> value. Text is read as YAML, as on a command line: `0.9`, `null`,
            `[a, b]`, `{exact_match: 0.9}`. For a key that holds text it is taken as it is.
        presets: the folder of the presets.

    Raises:
        ConfigError: naming the file and the key.
    """
    overrides = overrides or {}
    where = "the command line"
    tree: dict[str, Any] = {}
    if source is not None:
        path = find_file(source, presets)
        where = str(path)
        tree = _read(path, presets, ())
    for key, value in overrides.items():
        _set(tree, key, value)
    return resolve(tree, where, overrides)


def resolve(tree: Mapping[str, Any], where: str, overrides: Iterable[str] = ()) -> Config:
    """Return the validated Config of a plain tree.

    Args:
        tree: nested keys and values.
        where: what the tree was read from.
        overrides: dotted keys that were given as overrides instead.

    Raises:
        ConfigError: naming the dotted key and where it was given.
    """

    def given(key: str) -> str:
        overridden = any(o == key or o.startswith(f"{key}.") for o in overrides)
        return "on the command line" if overridden else f"in {where}, or what it extends"

    _reject_unknown(Config, tree, "", given)
    try:
        # Not strict: YAML reads 1e-3 as text, and scalars of overrides are text.
        config = msgspec.convert(tree, Config, strict=False)
    except msgspec.ValidationError as error:
        key, message = _explain(str(error), tree)
        raise ConfigError(f"{message} ({given(key)})") from error
    check_relations(config)
    return config


def find_file(source: str | Path, presets: Path) -> Path:
    """Return the file that `source` names: a path, or a preset with or without .yaml.

    Raises:
        ConfigError: if there is neither, with the names of the presets.
    """
    path = Path(source)
    for candidate in (path, presets / path, presets / f"{source}.yaml"):
        try:
            if candidate.is_file():
                return candidate
        except (OSError, ValueError):  # a name too long, or with a NUL
            continue
    names = ", ".join(sorted(p.stem for p in presets.glob("*.yaml")))
    hint = "" if path.is_absolute() else " (under `mlflow run`, give the absolute path)"
    raise ConfigError(
        f"no configuration {str(source)!r}: it is not a file{hint}, and not a preset: {names}"
    )


def from_json(data: bytes, where: str) -> Config:
    """Return the configuration that :func:`identity.to_json` wrote.

    A key that did not exist when it was written takes its default.

    Args:
        data: JSON.
        where: what it was read from.

    Raises:
        ConfigError: if it is not JSON or not a configuration, or if a newer version of the package
            wrote it.
    """
    try:
        tree = msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where} is not a configuration: {error}") from error
    if "schema" not in tree:
        raise ConfigError(f"{where} is not a configuration: it has no schema version")
    _check_schema(tree.pop("schema"), where)
    unknown: list[str] = []
    _find_unknown(Config, tree, "", unknown)
    if unknown:
        raise ConfigError(
            f"{where} has the key {unknown[0]}, which this version does not know: a newer version"
            " wrote it; install that version"
        )
    return resolve(tree, where)


def inherit_auto(config: Config, before: Config) -> Config:
    """Return `config` with its null keys as an earlier part of the run resolved them.

    Args:
        config: the configuration to continue with.
        before: the run's configuration until now.

    Raises:
        ConfigError: if a value of `before` does not fit `config`.
    """
    length = config.data.sequence_length or before.data.sequence_length
    rows = config.training.microbatch_size
    if rows is None and before.training.microbatch_size is not None:
        # On another mesh a device has another number of rows: take a size that divides both.
        parts = config.training.batch_size // config.mesh.size
        rows = math.gcd(before.training.microbatch_size, parts)
    keys = ["loss_chunk", "fused"]
    if config.training.remat == before.training.remat:  # scan_layers depends on it
        keys.append("scan_layers")
    chosen = {k: getattr(before.training, k) for k in keys if getattr(config.training, k) is None}
    inherited = msgspec.structs.replace(
        config,
        data=msgspec.structs.replace(config.data, sequence_length=length),
        training=msgspec.structs.replace(config.training, microbatch_size=rows, **chosen),
    )
    check_relations(inherited)
    return inherited


def apply_overrides(config: Config, overrides: Mapping[str, Any]) -> Config:
    """Return `config` with some keys set anew.

    Args:
        config: the run's configuration until now.
        overrides: as for :func:`load_config`.

    Raises:
        ConfigError: naming the key.
    """
    tree: dict[str, Any] = msgspec.to_builtins(config)
    if any(key == "mesh" or key.startswith("mesh.") for key in overrides):
        tree["training"]["microbatch_size"] = None  # it was chosen for the old mesh
    for key, value in overrides.items():
        _set(tree, key, value)
    return inherit_auto(resolve(tree, "the run's configuration", overrides), config)


def _read(path: Path, presets: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path} extends itself; remove one `extends:`")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError, OSError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} cannot be read as YAML: {reason}") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise ConfigError(f"{path} must contain a mapping of keys to values")
    if "schema" in tree:  # the config.json of a run
        _check_schema(tree.pop("schema"), str(path))
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise ConfigError(f"`extends` in {path} must name one file")
    beside = path.parent / parent
    base = beside if beside.is_file() else find_file(parent, presets)
    return _merge(_read(base, presets, (*seen, path.resolve())), tree)


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe subset, without keys that are given twice."""


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is given twice", node.start_mark
            )
    return loader.construct_mapping(node, deep=True)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _merge(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


class _TextScalars(yaml.SafeLoader):
    """YAML's safe subset, whose scalars stay text, except null: the schema tells their types."""


def _scalar(loader: _TextScalars, node: yaml.ScalarNode) -> str | None:
    return None if node.tag == "tag:yaml.org,2002:null" else str(node.value)


_TextScalars.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
for _tag in ("null", "bool", "int", "float", "timestamp", "str", "merge", "value", "binary"):
    _TextScalars.add_constructor(f"tag:yaml.org,2002:{_tag}", _scalar)


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    node = tree
    *parents, last = key.split(".")
    for part in parents:
        inner = node.get(part)
        node[part] = inner = dict(inner) if isinstance(inner, dict) else {}
        node = inner
    kinds = _types_of(key)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        value = _parse(value, is_text=str in kinds)
        if bool in kinds:
            value = yaml.SafeLoader.bool_values.get(str(value).lower(), value)
    is_section = any(isinstance(kind, type) and issubclass(kind, Struct) for kind in kinds)
    if is_section and isinstance(value, dict) and isinstance(node.get(last), dict):
        value = _merge(node[last], value)
    node[last] = value


def _parse(text: str, *, is_text: bool) -> Any:
    """Return the value of an override; of a key that holds text only quotes and null are read."""
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    if is_text and not quoted:
        return None if text == "null" else text
    try:
        value = yaml.load(text, _TextScalars) if text.strip() else text
    except (yaml.YAMLError, RecursionError, ValueError):
        return text
    return value if isinstance(value, str) or not is_text else text


def _types_of(key: str) -> set[Any]:
    """Return the types that the value of a dotted key may have; empty for an unknown key."""
    kinds: set[Any] = {Config}
    for part in key.split("."):
        hints: dict[str, Any] = {}
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, Struct):
                hints |= typing.get_type_hints(kind)
        kinds = _members(hints[part]) if part in hints else set()
    return kinds


def _members(annotation: Any) -> set[Any]:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return {m for inner in typing.get_args(annotation) for m in _members(inner)}
    if origin is typing.Literal:
        return {type(value) for value in typing.get_args(annotation)}
    return {annotation}


def _check_schema(version: object, where: str) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ConfigError(f"{where}: schema: expected a schema version, got {version!r}")
    if version > SCHEMA_VERSION:
        raise ConfigError(
            f"{where} has schema version {version}, and this version reads up to {SCHEMA_VERSION}:"
            " a newer version wrote it; install that version"
        )


def _reject_unknown(
    kind: type[Struct], tree: Mapping[str, Any], prefix: str, given: Callable[[str], str]
) -> None:
    fields = typing.get_type_hints(kind)
    for key, value in tree.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(fields)}"
            raise ConfigError(f"unknown key {prefix}{key} ({given(prefix + str(key))}); {hint}")
        inner = fields[key]
        if isinstance(inner, type) and issubclass(inner, Struct):
            if not isinstance(value, dict):
                raise ConfigError(
                    f"{prefix}{key} ({given(prefix + key)}) must be a section of keys"
                )
            _reject_unknown(inner, value, f"{prefix}{key}.", given)


def _find_unknown(
    kind: type[Struct], tree: Mapping[str, Any], prefix: str, into: list[str]
) -> None:
    fields = typing.get_type_hints(kind)
    for key, value in tree.items():
        if key not in fields:
            into.append(f"{prefix}{key}")
            continue
        for inner in _members(fields[key]):
            if isinstance(inner, type) and issubclass(inner, Struct) and isinstance(value, dict):
                _find_unknown(inner, value, f"{prefix}{key}.", into)


def _explain(message: str, tree: Mapping[str, Any]) -> tuple[str, str]:
    """Return the dotted key of a message of msgspec's, and `a.b: expected int, got 'x'`."""
    text, _, path = message.partition(" - at ")
    key = path.strip("`").removeprefix("$.")
    value: Any = tree
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    text = (text[:1].lower() + text[1:]).replace("`", "").partition(", got ")[0]
    return key, f"{key}: {text}, got {value!r}"


def check_relations(config: Config) -> None:
    """Check what two keys must have in common, and what a type cannot say.

    Raises:
        ConfigError: naming the keys.
    """
    for key, value in flatten(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key}: expected a finite number, got {value}")
    model, training = config.model, config.training
    if model.heads % model.kv_heads:
        raise ConfigError(
            f"model.heads={model.heads} must be a multiple of model.kv_heads={model.kv_heads}"
        )
    if model.head_dim is None and model.width % model.heads:
        raise ConfigError(
            f"model.width={model.width} must be a multiple of model.heads={model.heads},"
            f" or set model.head_dim"
        )
    if config.lora.rank and not config.lora.targets:
        raise ConfigError("lora.targets is empty: name a linear layer, or set lora.rank=0")
    if model.head_width % 2:
        raise ConfigError("the width of one head must be even: set model.head_dim")
    if training.batch_size % (config.mesh.size * (training.microbatch_size or 1)):
        parts = []
        if training.microbatch_size:
            parts.append(f"training.microbatch_size={training.microbatch_size}")
        if config.mesh.size > 1:
            parts.append(f"the {config.mesh.size} devices of mesh")
        raise ConfigError(
            f"training.batch_size={training.batch_size} must be a multiple of"
            f" {' times '.join(parts)}"
        )
    splits = {
        "data.train_split": config.data.train_split,
        "data.validation_split": config.data.validation_split,
        "evaluation.split": config.evaluation.split,
    }
    for (one, split), (other, same) in itertools.combinations(splits.items(), 2):
        if split == same:
            raise ConfigError(
                f"{one} and {other} are both {split!r}: what is trained on, what training chooses"
                " by and what is evaluated must be three splits"
            )
    device, _, index = config.device.partition(":")
    if device not in ("auto", "cpu", "gpu", "tpu") or (
        ":" in config.device and not re.fullmatch("[0-9]{1,4}", index)
    ):
        raise ConfigError(
            f"device: expected auto, cpu, gpu or tpu with an optional :index, got {config.device!r}"
        )
