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
import math
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml
from msgspec import Struct

from tunix_mlflow import paths
from tunix_mlflow.config.relations import check_relations
from tunix_mlflow.config.schema import SCHEMA_VERSION, Config
from tunix_mlflow.config.tree import choices, members, merge, read_yaml, set_key
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
        set_key(tree, key, value)
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
        set_key(tree, key, value)
    return inherit_auto(resolve(tree, "the run's configuration", overrides), config)


def _read(path: Path, presets: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path} extends itself; remove one `extends:`")
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"))
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
    return merge(_read(base, presets, (*seen, path.resolve())), tree)


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
        for inner in members(fields[key]):
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
    if allowed := choices(key):
        text = f"expected {', '.join(str(value) for value in allowed[:-1])} or {allowed[-1]}"
    return key, f"{key}: {text}, got {value!r}"
