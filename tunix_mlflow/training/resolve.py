"""From the configuration that a user wrote to the one that a run computes with.

What is left open (`null`) is decided by rules, never by a measurement: it decides the order of
sums, and so the bits of a run. These are the only functions of the room that return another Config.
"""

from __future__ import annotations

import msgspec

from tunix_mlflow.config.schema import Config, ModelConfig
from tunix_mlflow.errors import ConfigError, DatasetError
from tunix_mlflow.input import packing
from tunix_mlflow.training.losses import logits_chunk

_CPU_TOKENS, _CPU_LORA_TOKENS = 512, 256
"""Tokens of a microbatch on a CPU: its activations stay in the cache. With LoRA, activations are
most of what memory is needed for, so there are fewer."""
_FUSED_TOKENS = 2048
"""Tokens of an update on a CPU from which on fused projections are faster."""
_UNROLLED_LAYERS = 16
"""Blocks that are compiled one by one off a CPU; more are scanned."""


def with_base_shape(config: Config, shape: ModelConfig) -> Config:
    """Return the configuration with the shape of its base model.

    Raises:
        ConfigError: if `model.*` says another shape.
    """
    if config.model not in (ModelConfig(), shape):
        raise ConfigError(
            f"model.* differs from the shape of {config.base}; leave it out, the base decides it"
        )
    return msgspec.structs.replace(config, model=shape)


def with_length(config: Config, needed: int) -> Config:
    """Return the configuration with a sequence length that holds `needed` tokens.

    Raises:
        DatasetError: if that is more than attention takes without being asked for, or more than
            the model was made for.
    """
    length = config.data.sequence_length
    if length is None:
        if needed > packing.LONGEST_FIT:
            raise DatasetError(
                f"the longest example of {config.dataset} needs {needed} tokens; attention takes"
                " memory by the square of that. Set data.sequence_length, and if need be"
                " data.overlong=truncate or drop"
            )
        length = packing.fit_length(needed)
    positions = config.model.max_positions
    if positions is not None and length > positions:
        raise DatasetError(
            f"data.sequence_length={length} is more than the {positions} tokens that the model was"
            " made for"
        )
    data = msgspec.structs.replace(config.data, sequence_length=length)
    return msgspec.structs.replace(config, data=data)


def resolve_auto(config: Config, vocab_size: int, platform: str) -> Config:
    """Return the configuration with every computational choice made.

    Args:
        config: with a sequence length.
        vocab_size: rows of the embedding table.
        platform: jax's name of the device's platform.

    Raises:
        ConfigError: for LoRA without a base model.
    """
    if config.lora.rank and config.base is None:
        raise ConfigError("lora.rank needs a model to adapt: set base, or lora.rank=0")
    training, length = config.training, config.data.sequence_length or 0
    device_rows = training.batch_size // config.mesh.size
    limit = _CPU_LORA_TOKENS if config.lora.rank else _CPU_TOKENS
    chunk = training.loss_chunk
    if chunk is None:
        chunk = logits_chunk(vocab_size)
    fused = training.fused
    if fused is None:
        fused = platform == "cpu" and device_rows * length >= _FUSED_TOKENS
    scan = training.scan_layers
    if scan is None:
        deep = platform != "cpu" and config.model.layers > _UNROLLED_LAYERS
        scan = deep or training.remat != "none"
    training = msgspec.structs.replace(
        training,
        microbatch_size=training.microbatch_size
        or microbatch_rows(device_rows, length, platform, limit),
        loss_chunk=chunk,
        fused=fused and not config.lora.rank,  # an adapter belongs to one projection
        scan_layers=scan,
    )
    return msgspec.structs.replace(config, training=training)


def microbatch_rows(rows: int, length: int, platform: str, tokens: int = _CPU_TOKENS) -> int:
    """Return the rows of a microbatch: on a CPU the largest divisor of `rows` within `tokens`.

    Args:
        rows: rows of an update on one device.
        length: tokens in a row.
        platform: off a CPU, all rows are one microbatch.
        tokens: at most so many tokens, but at least one row.
    """
    if platform != "cpu":
        return rows
    divisors = [n for n in range(1, rows + 1) if rows % n == 0]
    return max(n for n in divisors if n * length <= tokens or n == 1)
