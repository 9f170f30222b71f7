"""What a run will need of a device's memory, before anything is allocated: arithmetic alone.

Counted are the arrays that live at the step's fullest moment, not what a compiler adds or saves: a
test holds the sum to within a third of what XLA reserves on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import jax
import msgspec
import psutil

from tunix_mlflow.config.schema import Config, DataConfig, ModelConfig, TrainingConfig
from tunix_mlflow.models import decoder, lora
from tunix_mlflow.training.setup import Inputs, resolve_auto

CARDS = {"24 GB": 24 * 10**9, "80 GB": 80 * 10**9, "141 GB": 141 * 10**9}
"""GPUs that people have."""
_BYTES = {"float32": 4, "bfloat16": 2}
FREE = 0.92  # of a device's memory; the rest is the runtime's
_MOMENTS = 2  # of AdamW; Muon has one of most matrices


class Forecast(NamedTuple):
    """Bytes on each device."""

    parameters: int  # and, beside adapters, those that are frozen
    optimizer: int
    gradients: int
    activations: int  # of one microbatch, with its logits

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)

    def text(self) -> str:
        """In gigabytes, on one line."""
        parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in self._asdict().items())
        return f"{self.total / 1e9:.2f} GB: {parts}"


def forecast(config: Config, vocab_size: int) -> Forecast:
    """The forecast of a settled configuration.

    Args:
        config: with sequence length, microbatch and chunk chosen.
        vocab_size: rows of the embedding table.
    """
    training, mesh = config.training, config.mesh
    stored, computed = _BYTES[training.param_dtype], _BYTES[training.compute_dtype]
    whole = decoder.parameter_count(decoder.shape(config.model, vocab_size)[1])
    trained, item, frozen = whole, stored, 0  # numbers, bytes of each, bytes in all
    if config.lora.rank:
        trained = decoder.parameter_count(lora.shape(config.model, vocab_size, config.lora))
        item, frozen = _BYTES["float32"], whole * stored
    formed = bool(training.fused) + bool(training.scan_layers and not config.lora.rank)
    # As the products want them: fused, then stacked, or in another type, in one go with the last.
    copies = whole * computed * max(formed, stored != computed)
    if mesh.fsdp > 1:
        copies += trained * item + frozen  # gathered
    kept = (trained * item + frozen) // mesh.fsdp
    sums = 2 if config.microbatches > 1 else 1  # of all so far, and of one microbatch
    return Forecast(
        parameters=kept + copies,
        optimizer=_MOMENTS * trained * item // mesh.fsdp,
        gradients=sums * trained * 4,
        activations=_activations(config, vocab_size, computed),
    )


def _activations(config: Config, vocab_size: int, item: int) -> int:
    """What the backward pass of one microbatch finds, and its logits."""
    model, training = config.model, config.training
    length = config.data.sequence_length or 0
    rows = training.microbatch_size or training.batch_size // config.mesh.size
    tokens = rows * length
    heads, groups = model.heads * model.head_width, model.kv_heads * model.head_width
    on_cpu = config.device.startswith("cpu")
    if config.device == "auto":
        on_cpu = jax.default_backend() == "cpu"
    # Outside a loop, XLA merges on a CPU what was to be computed again with what was before.
    remat = training.remat if training.scan_layers or not on_cpu else "none"
    # Shares of attention: elsewhere a kernel makes them again.
    probability_bytes = model.heads * length * 4 if on_cpu else 0
    block = (
        4 * model.width + 3 * (heads + groups) + 4 * model.mlp_width
    ) * item + probability_bytes
    kept = {
        "none": block,
        "dots": (3 * model.width + heads + 2 * groups + 2 * model.mlp_width) * item,
        "block": model.width * item,
    }[remat]
    at_once = 0 if remat == "none" else block
    chunk = min(tokens, training.loss_chunk or tokens)
    logits = int(2.5 * chunk * vocab_size * 4)
    return tokens * (model.layers * kept + at_once) + logits


class MemoryReport(NamedTuple):
    """Whether a run fits."""

    needs: Forecast
    available_bytes: int  # bytes that it may take of each device
    remedies: list[str]  # what would make it fit, the least change first

    @property
    def fits(self) -> bool:
        """As it is."""
        return self.needs.total <= self.available_bytes

    def text(self) -> str:
        """On one line."""
        said = f"needs {self.needs.text()}; a device has {self.available_bytes / 1e9:.2f} GB"
        if self.fits:
            return said
        known = "; ".join(self.remedies)
        return f"{said}. {f'What would fit: {known}' if known else 'Nothing known makes it fit'}"


def check_memory(inputs: Inputs) -> MemoryReport:
    """Hold what a run needs against what its devices have; nothing is allocated."""
    config, size = inputs.config, inputs.vocab_size
    available_bytes = capacity(inputs.device, config.mesh.size)
    needs = forecast(config, size)
    return MemoryReport(
        needs,
        available_bytes,
        [] if needs.total <= available_bytes else _remedies(config, size, available_bytes),
    )


def capacity(device: jax.Device, count: int) -> int:
    """Bytes that a run may take of each of `count` devices; those of a CPU share its memory."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return int(FREE * (limit or psutil.virtual_memory().available / count))


def table(model: ModelConfig, vocab_size: int, length: int) -> dict[str, Forecast]:
    """What ways of fine-tuning need on one GPU, one row at a time, blocks computed again."""
    config = Config(
        device="gpu",
        model=model,
        data=DataConfig(sequence_length=length),
        training=TrainingConfig(batch_size=1, microbatch_size=1, remat="block", loss_chunk=1024),
    )
    narrow = _training(param_dtype="bfloat16", compute_dtype="bfloat16")
    ways = {
        "full, float32": config,
        "full, bfloat16": narrow(config),
        "LoRA 16, float32": _adapted(config),
        "LoRA 16, bfloat16": narrow(_adapted(config)),
    }
    return {
        name: forecast(resolve_auto(way, vocab_size, "gpu"), vocab_size)
        for name, way in ways.items()
    }


def _remedies(config: Config, vocab_size: int, available_bytes: int) -> list[str]:
    changed = {words: change(config) for words, change in _CHANGES.items()}
    changed["all of these"] = reduce(
        lambda so_far, change: change(so_far), _CHANGES.values(), config
    )
    needs = {words: forecast(each, vocab_size).total for words, each in changed.items()}
    return [
        f"{words} ({need / 1e9:.1f} GB)" for words, need in needs.items() if need <= available_bytes
    ]


def _training(**words: object) -> Callable[[Config], Config]:
    def change(config: Config) -> Config:
        training = msgspec.structs.replace(config.training, **words)
        return msgspec.structs.replace(config, training=training)

    return change


def _adapted(config: Config) -> Config:
    return msgspec.structs.replace(
        config,
        base=config.base or "a model",
        lora=msgspec.structs.replace(config.lora, rank=config.lora.rank or 16),
        training=msgspec.structs.replace(config.training, fused=False),
    )


_CHANGES: dict[str, Callable[[Config], Config]] = {
    "training.microbatch_size=1": _training(microbatch_size=1),
    "training.remat=block training.scan_layers=true": _training(remat="block", scan_layers=True),
    "training.param_dtype=bfloat16 training.compute_dtype=bfloat16": _training(
        param_dtype="bfloat16", compute_dtype="bfloat16"
    ),
    "lora.rank=16": _adapted,
}
