"""What a run needs of a device's memory, computed before anything is allocated.

The forecast counts the arrays that are alive at the step's peak, not what a compiler adds or saves;
a test holds the sum to within a third of what XLA reserves on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import jax
import msgspec

from tunix_mlflow.config.schema import Config, DataConfig, ModelConfig, TrainingConfig
from tunix_mlflow.models import decoder, lora
from tunix_mlflow.runtime import memory
from tunix_mlflow.training.resolve import resolve_auto

CARDS = {"24 GB": 24 * 10**9, "80 GB": 80 * 10**9, "141 GB": 141 * 10**9}
"""Common GPU memory sizes, in bytes."""
USABLE = 0.92
"""Share of a device's memory that a run may take; the rest is the runtime's."""
_BYTES = {"float32": 4, "bfloat16": 2}
_MOMENTS = 2  # of AdamW; Muon has one of most matrices


class MemoryForecast(NamedTuple):
    """Bytes on each device."""

    parameters: int  # frozen ones beside adapters included
    optimizer: int
    gradients: int
    activations: int  # of one microbatch, with its logits

    @property
    def total(self) -> int:
        """The sum."""
        return sum(self)

    def text(self) -> str:
        """Return the forecast in gigabytes, on one line."""
        parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in self._asdict().items())
        return f"{self.total / 1e9:.2f} GB: {parts}"


class MemoryReport(NamedTuple):
    """Whether a run fits."""

    needs: MemoryForecast
    available_bytes: int  # that it may take of each device
    remedies: list[str]  # what would make it fit, the smallest change first
    source: str = ""  # what limits the memory

    @property
    def fits(self) -> bool:
        """Whether it fits without a change."""
        return self.needs.total <= self.available_bytes

    def text(self) -> str:
        """Return the report on one line."""
        limit = f" ({self.source})" if self.source else ""
        has = f"a device has {self.available_bytes / 1e9:.2f} GB{limit}"
        text = f"needs {self.needs.text()}; {has}"
        if self.fits:
            return text
        remedies = "; ".join(self.remedies)
        return f"{text}. {f'What would fit: {remedies}' if remedies else 'Nothing known fits'}"


def check_memory(
    config: Config, vocab_size: int, device: jax.Device, *, available: int | None = None
) -> MemoryReport:
    """Compare what a run needs with what its devices have; nothing is allocated.

    Args:
        config: resolved.
        vocab_size: rows of the embedding table.
        device: the first device.
        available: bytes that a run may take of each device; None: what they have.
    """
    source = ""
    if available is None:
        available, source = device_capacity(device, config.mesh.size)
    needs = forecast(config, vocab_size)
    remedies = [] if needs.total <= available else _remedies(config, vocab_size, available)
    return MemoryReport(needs, available, remedies, source)


def device_capacity(device: jax.Device, count: int) -> memory.Allowance:
    """Return the bytes that a run may take of each of `count` devices; CPU devices share memory."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        return memory.Allowance(int(USABLE * limit), "the device")
    found = memory.available()
    return memory.Allowance(int(USABLE * found.bytes / count), found.source)


def forecast(config: Config, vocab_size: int) -> MemoryForecast:
    """Return the forecast of a resolved configuration.

    Args:
        config: with sequence length, microbatch and chunk chosen.
        vocab_size: rows of the embedding table.
    """
    training, mesh = config.training, config.mesh
    stored, computed = _BYTES[training.param_dtype], _BYTES[training.compute_dtype]
    total = decoder.parameter_count(decoder.shape(config.model, vocab_size)[1])
    trained, item, frozen = total, stored, 0  # numbers, bytes of each, bytes in all
    if config.lora.rank:
        trained = decoder.parameter_count(lora.shape(config.model, vocab_size, config.lora))
        item, frozen = _BYTES["float32"], total * stored
    layouts = bool(training.fused) + bool(training.scan_layers and not config.lora.rank)
    # Copies in the compute layout: fused, then stacked; a cast happens with the last of them.
    copies = total * computed * max(layouts, stored != computed)
    if mesh.fsdp > 1:
        copies += trained * item + frozen  # gathered
    stored_bytes = (trained * item + frozen) // mesh.fsdp
    sums = 2 if config.microbatches > 1 else 1  # the running sum, and that of one microbatch
    return MemoryForecast(
        parameters=stored_bytes + copies,
        optimizer=_MOMENTS * trained * item // mesh.fsdp,
        gradients=sums * trained * 4,
        activations=_activations(config, vocab_size, computed),
    )


def finetuning_table(model: ModelConfig, vocab_size: int, length: int) -> dict[str, MemoryForecast]:
    """Return what fine-tuning needs on one GPU, one row at a time, with rematerialization."""
    config = Config(
        device="gpu",
        model=model,
        data=DataConfig(sequence_length=length),
        training=TrainingConfig(batch_size=1, microbatch_size=1, remat="block", loss_chunk=1024),
    )
    bfloat16 = _with_training(param_dtype="bfloat16", compute_dtype="bfloat16")
    ways = {
        "full, float32": config,
        "full, bfloat16": bfloat16(config),
        "LoRA 16, float32": _with_lora(config),
        "LoRA 16, bfloat16": bfloat16(_with_lora(config)),
    }
    return {
        name: forecast(resolve_auto(way, vocab_size, "gpu"), vocab_size)
        for name, way in ways.items()
    }


def _activations(config: Config, vocab_size: int, item: int) -> int:
    """Return the bytes that one microbatch keeps for its backward pass, and of its logits."""
    model, training = config.model, config.training
    length = config.data.sequence_length or 0
    rows = training.microbatch_size or training.batch_size // config.mesh.size
    tokens = rows * length
    heads, groups = model.heads * model.head_width, model.kv_heads * model.head_width
    on_cpu = config.device.startswith("cpu")
    if config.device == "auto":
        on_cpu = jax.default_backend() == "cpu"
    # Outside a loop, XLA on a CPU undoes rematerialization.
    remat = training.remat if training.scan_layers or not on_cpu else "none"
    # Attention probabilities: elsewhere a kernel recomputes them.
    probabilities = model.heads * length * 4 if on_cpu else 0
    block = (4 * model.width + 3 * (heads + groups) + 4 * model.mlp_width) * item + probabilities
    saved = {
        "none": block,
        "dots": (3 * model.width + heads + 2 * groups + 2 * model.mlp_width) * item,
        "block": model.width * item,
    }[remat]
    recomputed = 0 if remat == "none" else block
    chunk = min(tokens, training.loss_chunk or tokens)
    logits = int(2.5 * chunk * vocab_size * 4)
    return tokens * (model.layers * saved + recomputed) + logits


def _remedies(config: Config, vocab_size: int, available: int) -> list[str]:
    changed = {text: change(config) for text, change in _CHANGES.items()}
    changed["all of these"] = reduce(
        lambda so_far, change: change(so_far), _CHANGES.values(), config
    )
    needs = {text: forecast(each, vocab_size).total for text, each in changed.items()}
    return [f"{text} ({need / 1e9:.1f} GB)" for text, need in needs.items() if need <= available]


def _with_training(**values: object) -> Callable[[Config], Config]:
    def change(config: Config) -> Config:
        training = msgspec.structs.replace(config.training, **values)
        return msgspec.structs.replace(config, training=training)

    return change


def _with_lora(config: Config) -> Config:
    return msgspec.structs.replace(
        config,
        base=config.base or "a model",
        lora=msgspec.structs.replace(config.lora, rank=config.lora.rank or 16),
        training=msgspec.structs.replace(config.training, fused=False),
    )


_CHANGES: dict[str, Callable[[Config], Config]] = {
    "training.microbatch_size=1": _with_training(microbatch_size=1),
    "training.remat=block training.scan_layers=true": _with_training(
        remat="block", scan_layers=True
    ),
    "training.param_dtype=bfloat16 training.compute_dtype=bfloat16": _with_training(
        param_dtype="bfloat16", compute_dtype="bfloat16"
    ),
    "lora.rank=16": _with_lora,
}
