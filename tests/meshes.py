"""Trains a few steps on several meshes of four virtual devices; prints what came out as JSON.

In a process of its own: jax counts devices once, when it starts.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np

from tunix_mlflow.config.load import resolve
from tunix_mlflow.config.schema import Config, LoraConfig
from tunix_mlflow.data.examples import reasoning_trace
from tunix_mlflow.input.batches import TrainBatches
from tunix_mlflow.input.packing import lay_out_rows
from tunix_mlflow.input.tokens import encode_examples
from tunix_mlflow.models import arrays, decoder, lora
from tunix_mlflow.runtime import devices
from tunix_mlflow.text.byte_tokenizer import ByteTokenizer
from tunix_mlflow.training import mesh as meshes
from tunix_mlflow.training.checkpoint import Checkpoints, Retention
from tunix_mlflow.training.resolve import resolve_auto
from tunix_mlflow.training.spec import step_spec
from tunix_mlflow.training.state import InitialState, TrainState, init_state
from tunix_mlflow.training.trainer import Trainer

STEPS = 4
# Rows of unequal token counts, so that a mean over devices would show.
EXAMPLES = [reasoning_trace(f"n{n}", [("t", "s" * n)], f"{n}").example() for n in range(1, 30)]
TOKENIZED = encode_examples(EXAMPLES, ByteTokenizer(), True)

VOCABULARY = ByteTokenizer.vocab_size


def configured(data: int, fsdp: int, optimizer: str) -> Config:
    tree = {
        "model": {"layers": 1, "width": 16, "heads": 2, "kv_heads": 1, "mlp_width": 24},
        "data": {"sequence_length": 64, "packing": False},
        "training": {"steps": STEPS, "batch_size": 8, "microbatch_size": 1},
        "optimizer": {"name": optimizer, "warmup_steps": 0},
        "mesh": {"data": data, "fsdp": fsdp},
    }
    return resolve_auto(resolve(tree, "the test"), VOCABULARY, "cpu")


def new_trainer(config: Config) -> Trainer:
    return Trainer.create(config, VOCABULARY, devices.use("cpu"))


def train(trainer: Trainer, steps: int = STEPS) -> list[float]:
    """The losses of the updates up to `steps`."""
    rows = lay_out_rows(TOKENIZED, trainer.config.data, 64)
    stream = TrainBatches(rows, batch_size=8, seed=0)
    return [float(trainer.step(stream.at(step)).loss) for step in range(trainer.updates, steps)]


def trained(config: Config) -> tuple[TrainState, list[float]]:
    trainer = new_trainer(config)
    losses = train(trainer)
    return trainer.state, losses


def distance(a: TrainState, b: TrainState) -> float:
    pairs = zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True)
    return max(float(np.max(np.abs(np.asarray(x) - np.asarray(y)))) for x, y in pairs)


def moved(optimizer: str) -> dict[str, float]:
    """Trained on a mesh, saved, restored on another, trained on there."""
    here, there = configured(2, 2, optimizer), configured(1, 4, optimizer)
    trainer, other = new_trainer(here), new_trainer(there)
    train(trainer, STEPS // 2)
    target = jax.tree.leaves(other.state)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), {}, retention=Retention(1))
        checkpoints.save(STEPS // 2, trainer.state, {})
        checkpoints.wait()
        other.state = checkpoints.restore(STEPS // 2, other.state)
        checkpoints.close()
    restored = jax.tree.leaves(other.state)
    same_place = all(a.sharding == b.sharding for a, b in zip(restored, target, strict=True))
    exact = arrays.digest(other.state) == arrays.digest(trainer.state)
    train(other)
    uninterrupted, _ = trained(here)
    return {
        "exact": exact,
        "same_place": same_place,
        "distance": distance(other.state, uninterrupted),
    }


def adapted(data: int, fsdp: int, *, scanned: bool = False) -> TrainState:
    """Adapters trained beside frozen parameters that are sharded."""
    config = configured(data, fsdp, "adamw")
    config = msgspec.structs.replace(
        config,
        model=msgspec.structs.replace(config.model, layers=3),
        lora=LoraConfig(rank=2),
        training=msgspec.structs.replace(config.training, fused=False, scan_layers=scanned),
    )
    device = devices.use("cpu")
    spec = step_spec(config, VOCABULARY, device)
    frozen = decoder.init(config.model, VOCABULARY, 0)
    if scanned:
        frozen = decoder.stack(frozen)
    if spec.mesh is not None:
        frozen = jax.device_put(frozen, meshes.shardings(frozen, spec.mesh))
    adapters = lora.init(config.model, VOCABULARY, config.lora, 0)
    initial = InitialState(init_state(spec, adapters, device), frozen, None)
    trainer = Trainer(config, VOCABULARY, device, spec, initial)
    train(trainer)
    return trainer.state


def main() -> None:
    found: dict[str, Any] = {}
    for optimizer, grids in (("adamw", ((2, 1), (1, 4), (2, 2))), ("muon", ((2, 2),))):
        alone, losses = trained(configured(1, 1, optimizer))
        for data, fsdp in grids:
            config = configured(data, fsdp, optimizer)
            state, theirs = trained(config)
            again, _ = trained(config)
            held = [leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state.params)]
            found[f"{optimizer} {data}x{fsdp}"] = {
                "distance": distance(alone, state),
                "loss": max(abs(a - b) for a, b in zip(losses, theirs, strict=True)),
                "again": arrays.digest(again) == arrays.digest(state),
                "share": sum(held) / sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            }
    found["moved"] = moved("adamw")
    found["adapted"] = distance(adapted(1, 1), adapted(2, 2))
    found["scanned"] = distance(adapted(1, 1), adapted(2, 2, scanned=True))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
