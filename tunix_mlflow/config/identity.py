"""What identifies a configuration: canonical JSON, digests, and what a resumed run may change.

A digest is sha256 over the canonical JSON of
``{"schema": SCHEMA_VERSION, "keys": {dotted key: value}}``, with only the keys whose value differs
from their default. A key that is added with a default therefore changes no existing digest.
"""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
from msgspec import Struct

from tunix_mlflow.config.schema import SCHEMA_VERSION, Config

OUTSIDE = ("tracking", "limits", "checkpoints", "benchmark.peers_python")
"""Keys and sections that do not change a result: where it is recorded, what ingest accepts (the
dataset has a digest of its own), which checkpoints are kept, paths."""
TRAJECTORY = ("seed", "data", "model", "lora", "optimizer", "training")
"""Sections that determine the parameters after each step, together with the data."""
FREE = (
    *("data.evaluation_sets", "data.leakage", "training.steps", "training.eval_every_steps"),
    *("training.save_every_steps", "training.save_every_minutes", "training.microbatch_size"),
    *("optimizer.schedule_steps", "data.fidelity"),
)
"""Keys of these sections that may change when a run is resumed."""


def to_json(config: Config) -> bytes:
    """Return the whole configuration and its schema version as canonical JSON.

    The result is a configuration file as well: JSON is YAML.
    """
    tree = {"schema": SCHEMA_VERSION, **msgspec.to_builtins(config)}
    return msgspec.json.encode(tree, order="sorted")


def config_digest(config: Config) -> str:
    """Return the sha256 (64 hex) of the keys that change a result.

    Which base model it is, and which of several devices of a kind, is not part of it: the model
    has a digest of its own.
    """
    keys = {k: v for k, v in non_defaults(config).items() if not _below(k, OUTSIDE)}
    if "base" in keys:
        keys["base"] = True
    if "device" in keys:
        keys["device"] = config.device.partition(":")[0]
    return _digest(keys)


def trajectory_digest(config: Config) -> str:
    """Return the sha256 (64 hex) of the keys that may not change when a run is resumed."""
    return _digest({k: v for k, v in non_defaults(config).items() if _is_fixed(k)})


def differences(before: Config, after: Config) -> list[str]:
    """Return `key: a, now b` for each changed key that may not change when a run is resumed."""
    old, new = flatten(before), flatten(after)
    keys = [key for key in {**old, **new} if _is_fixed(key)]
    return [f"{k}: {old.get(k)}, now {new.get(k)}" for k in keys if old.get(k) != new.get(k)]


def non_defaults(config: Config) -> dict[str, Any]:
    """Return dotted key -> value for each key that differs from its default.

    A mapping such as `promotion.thresholds` is compared, and returned, as a whole: one dotted key
    for each of its entries.
    """
    found: dict[str, Any] = {}

    def visit(section: Struct, prefix: str) -> None:
        for field in msgspec.structs.fields(section):
            value, key = getattr(section, field.name), f"{prefix}{field.name}"
            default = field.default
            if field.default_factory is not msgspec.NODEFAULT:
                default = field.default_factory()
            if isinstance(value, Struct):
                before = len(found)
                visit(value, f"{key}.")
                if default is None and len(found) == before:
                    found[key] = {}  # an optional section that is set, with its own defaults
            elif value != default:
                _flatten(key, msgspec.to_builtins(value), found)

    visit(config, "")
    return found


def flatten(config: Config) -> dict[str, Any]:
    """Return dotted key -> value for all keys."""
    flat: dict[str, Any] = {}
    for key, value in msgspec.to_builtins(config).items():
        _flatten(key, value, flat)
    return flat


def _flatten(key: str, value: Any, into: dict[str, Any]) -> None:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            _flatten(f"{key}.{name}", inner, into)
    else:
        into[key] = value


def _digest(keys: dict[str, Any]) -> str:
    text = msgspec.json.encode({"schema": SCHEMA_VERSION, "keys": keys}, order="sorted")
    return hashlib.sha256(text).hexdigest()


def _is_fixed(key: str) -> bool:
    return _below(key, TRAJECTORY) and key not in FREE


def _below(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)
