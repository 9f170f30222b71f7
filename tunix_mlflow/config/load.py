"""Read a configuration: YAML files, what they extend, and dotted overrides.

A file may name another in ``extends:``; overrides (``training.steps=200``) come last. Unknown keys,
wrong types and values out of range are a ConfigError that names the key.
"""

from __future__ import annotations

import difflib
import math
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml
from msgspec import Struct

from tunix_mlflow.config.identity import flatten
from tunix_mlflow.config.schema import Config
from tunix_mlflow.errors import ConfigError


def load_config(source: str | Path | None, overrides: Mapping[str, str], presets: Path) -> Config:
    """Read a configuration.

    Args:
        source: a YAML file, or the name of a preset, or None for the defaults.
        overrides: dotted key -> text, as typed on a command line.
        presets: the folder of the named presets.

    Raises:
        ConfigError: naming the file and the key.
    """
    where = "the command line"
    tree: dict[str, Any] = {}
    if source is not None:
        path = find_file(source, presets)
        where = str(path)
        tree = _read(path, presets, ())
    for key, text in overrides.items():
        _set(tree, key, text)
    return resolve(tree, where, overrides)


def resolve(tree: Mapping[str, Any], where: str, overrides: Iterable[str] = ()) -> Config:
    """Turn a plain tree into a validated Config.

    Args:
        tree: nested keys and values.
        where: what the tree was read from.
        overrides: dotted keys that came from the command line instead.

    Raises:
        ConfigError: naming the dotted key and where it was given.
    """

    def given(key: str) -> str:
        typed = any(o == key or o.startswith(f"{key}.") for o in overrides)
        return "on the command line" if typed else f"in {where}, or what it extends"

    _reject_unknown(Config, tree, "", given)
    try:
        # Not strict: YAML reads 1e-3 as text, and overrides are text.
        config = msgspec.convert(tree, Config, strict=False)
    except msgspec.ValidationError as error:
        key, message = _explain(str(error), tree)
        raise ConfigError(f"{message} ({given(key)})") from error
    _check_relations(config)
    return config


def find_file(source: str | Path, presets: Path) -> Path:
    """The file that `source` names: a path, or a preset's name with or without .yaml."""
    path = Path(source)
    for candidate in (path, presets / path, presets / f"{source}.yaml"):
        try:
            if candidate.is_file():
                return candidate
        except (OSError, ValueError):  # a name too long, or with a NUL
            continue
    names = ", ".join(sorted(p.stem for p in presets.glob("*.yaml")))
    hint = "" if path.is_absolute() else " (under `mlflow run`, give the absolute path)"
    raise ConfigError(f"no configuration {str(source)!r}: not a file{hint}, nor one of {names}")


def from_json(data: bytes, where: str) -> Config:
    """Read back what :func:`to_json` wrote.

    Raises:
        ConfigError: if it is not JSON or not a configuration.
    """
    try:
        tree = msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where} is not a configuration: {error}") from error
    return resolve(tree, where)


def inherit_auto(config: Config, before: Config) -> Config:
    """What a configuration leaves open, as an earlier part of the run chose it.

    Raises:
        ConfigError: if that does not fit what it does say.
    """
    length = config.data.sequence_length or before.data.sequence_length
    rows = config.training.microbatch_size
    if rows is None and before.training.microbatch_size is not None:
        # On another mesh a device has other rows: what fits both.
        parts = config.training.batch_size // config.mesh.size
        rows = math.gcd(before.training.microbatch_size, parts)
    open_ = ["loss_chunk", "fused"]
    if config.training.remat == before.training.remat:  # which decides it
        open_.append("scan_layers")
    chosen = {k: getattr(before.training, k) for k in open_ if getattr(config.training, k) is None}
    found = msgspec.structs.replace(
        config,
        data=msgspec.structs.replace(config.data, sequence_length=length),
        training=msgspec.structs.replace(config.training, microbatch_size=rows, **chosen),
    )
    _check_relations(found)
    return found


def apply_overrides(config: Config, overrides: Mapping[str, str]) -> Config:
    """A configuration with some keys set anew.

    Args:
        config: the one before.
        overrides: dotted key -> text, as typed on a command line.

    Raises:
        ConfigError: naming the key.
    """
    tree: dict[str, Any] = msgspec.to_builtins(config)
    if any(key.startswith("mesh.") for key in overrides):
        tree["training"]["microbatch_size"] = None
    for key, text in overrides.items():
        _set(tree, key, text)
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
        raise ConfigError(f"{path} must hold a mapping of keys to values")
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


def _set(tree: dict[str, Any], key: str, text: str) -> None:
    # `null` is none, as in YAML.
    node = tree
    *parents, last = key.split(".")
    for part in parents:
        inner = node.get(part)
        node[part] = inner = dict(inner) if isinstance(inner, dict) else {}
        node = inner
    if text.startswith("[") and text.endswith("]"):  # a list, as YAML writes it
        node[last] = [word.strip() for word in text[1:-1].split(",") if word.strip()]
        return
    node[last] = None if text == "null" else text


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


def _explain(message: str, tree: Mapping[str, Any]) -> tuple[str, str]:
    """msgspec's message -> the dotted key, and `a.b: expected int, got 'x'`."""
    text, _, path = message.partition(" - at ")
    key = path.strip("`").removeprefix("$.")
    value: Any = tree
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    text = (text[:1].lower() + text[1:]).replace("`", "").partition(", got ")[0]
    return key, f"{key}: {text}, got {value!r}"


def _check_relations(config: Config) -> None:
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
        raise ConfigError("lora.targets is empty: name a product, or set lora.rank=0")
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
    if config.data.train_split == config.evaluation.split:
        raise ConfigError(
            f"evaluation.split is data.train_split, {config.data.train_split!r}:"
            " nothing would be held out"
        )
    device, _, index = config.device.partition(":")
    if device not in ("auto", "cpu", "gpu", "tpu") or (
        ":" in config.device and not re.fullmatch("[0-9]{1,4}", index)
    ):
        raise ConfigError(
            f"device: expected auto, cpu, gpu or tpu with an optional :index, got {config.device!r}"
        )
