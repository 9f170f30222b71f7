"""What identifies a configuration: canonical JSON, digests, and what a resumed run may change."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from tunix_mlflow.config.schema import Config


def to_json(config: Config) -> bytes:
    """Canonical JSON: sorted keys, no spaces."""
    return msgspec.json.encode(config, order="sorted")


def config_digest(config: Config) -> str:
    """sha256 (64 hex) of the canonical JSON."""
    return hashlib.sha256(to_json(config)).hexdigest()


FIXED = ("seed", "data", "model", "lora", "optimizer", "training")
"""What decides the path of the parameters, with the data itself."""
FREE = (
    *("data.evaluation_sets", "data.leakage", "training.steps", "training.eval_every_steps"),
    *("training.save_every_steps", "training.save_every_minutes", "training.microbatch_size"),
)
"""What of it may change when a run goes on."""


def differences(before: Config, after: Config) -> list[str]:
    """`key: a, now b` for each key that may not change when a run goes on, and did."""
    old, new = _trajectory(before), _trajectory(after)
    return [f"{k}: {old.get(k)}, now {new.get(k)}" for k in new if old.get(k) != new.get(k)]


def trajectory_digest(config: Config) -> str:
    """sha256 (64 hex) of what may not change when a run goes on."""
    return hashlib.sha256(msgspec.json.encode(_trajectory(config), order="sorted")).hexdigest()


def _trajectory(config: Config) -> dict[str, Any]:
    flat = flatten(config).items()
    return {k: v for k, v in flat if k.partition(".")[0] in FIXED and k not in FREE}


def flatten(config: Config) -> dict[str, Any]:
    """Dotted key -> value, as it goes into MLflow's params."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = value

    walk("", msgspec.to_builtins(config))
    return flat
