"""What several keys of a configuration must have in common, and what a type cannot say."""

from __future__ import annotations

import math
import re

from tunix_mlflow.config.identity import flatten
from tunix_mlflow.config.schema import Config
from tunix_mlflow.errors import ConfigError


def check_relations(config: Config) -> None:
    """Check a configuration whose types are right.

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
    if config.data.train_split == config.data.validation_split:
        raise ConfigError(
            f"data.train_split and data.validation_split are both {config.data.train_split!r}:"
            " what training chooses by must be another split than what is trained on"
        )
    if config.checkpoints.keep_best and config.checkpoints.metric != "validation/loss":
        raise ConfigError(
            f"checkpoints.metric={config.checkpoints.metric!r} is not measured when a checkpoint is"
            " saved: use validation/loss, or set checkpoints.keep_best=0"
        )
    device, _, index = config.device.partition(":")
    if device not in ("auto", "cpu", "gpu", "tpu") or (
        ":" in config.device and not re.fullmatch("[0-9]{1,4}", index)
    ):
        raise ConfigError(
            f"device: expected auto, cpu, gpu or tpu with an optional :index, got {config.device!r}"
        )
