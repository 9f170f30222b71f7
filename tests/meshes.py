"""Trains a few steps on several meshes of four virtual devices; prints what came out as JSON.

In a process of its own: jax counts devices once, when it starts.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import jax
import msgspec
import numpy as np

from tunix_mlflow.config.load import resolve
from tunix_mlflow.config.schema import Config, LoraConfig
from tunix_mlflow.data.examples import reasoning_trace
from tunix_mlflow.input import batches, packing, tokens
from tunix_mlflow.models import arrays, decoder, lora
from tunix_mlflow.runtime import devices
from tunix_mlflow.text.byte_tokenizer import ByteTokenizer
from tunix_mlflow.training import mesh as meshes
from tunix_mlflow.training import setup
from tunix_mlflow.training.checkpoint import Checkpoints, Retention
from tunix_mlflow.training.step import TrainState, train_step

STEPS = 4
# Rows of unequal token counts, so that a mean over devices would show.
EXAMPLES = [reasoning_trace(f"n{n}", [("t", "s" * n)], f"{n}").example() for n in range(1, 30)]
TOKENIZED = tokens.encode_examples(EXAMPLES, ByteTokenizer(), True)


def configured(data: int, fsdp: int, optimizer: str) -> Config:
    tree = {
        "model": {"layers": 1, "width": 16, "heads": 2, "kv_heads": 1, "mlp_width": 24},
        "data": {"sequence_length": 64, "packing": False},
        "training": {"steps": STEPS, "batch_size": 8, "microbatch_size": 1},
        "optimizer": {"name": optimizer, "warmup_steps": 0},
        "mesh": {"data": data, "fsdp": fsdp},
    }
    vocabulary = ByteTokenizer.vocab_size
    return setup.resolve_auto(resolve(tree, "the test"), vocabulary, "cpu")


def begin(config: Config) -> tuple[setup.StepSpec, TrainState]:
    vocabulary, device = ByteTokenizer.vocab_size, devices.use("cpu")
    spec = setup.step_spec(config, vocabulary, device)
    return spec, setup.start(spec, config, vocabulary, device, None)[0]


def trained(config: Config, state: TrainState | None = None) -> tuple[TrainState, list[float]]:
    spec, fresh = begin(config)
    at = state or fresh
    rows = packing.lay_out_rows(TOKENIZED, config.data, 64)
    stream = batches.TrainBatches(rows, batch_size=8, seed=0)
    losses = []
    for step in range(int(at.step), STEPS):
        at, metrics = train_step(at, stream.at(step), spec=spec)
        losses.append(float(metrics.loss))
    return at, losses


def distance(a: TrainState, b: TrainState) -> float:
    pairs = zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True)
    return max(float(np.max(np.abs(np.asarray(x) - np.asarray(y)))) for x, y in pairs)


def moved(optimizer: str) -> dict[str, float]:
    """Trained on a mesh, saved, restored on another, trained on there."""
    here, there = configured(2, 2, optimizer), configured(1, 4, optimizer)
    spec, state = begin(here)
    rows = packing.lay_out_rows(TOKENIZED, here.data, 64)
    stream = batches.TrainBatches(rows, batch_size=8, seed=0)
    for step in range(STEPS // 2):
        state, _ = train_step(state, stream.at(step), spec=spec)
    with tempfile.TemporaryDirectory() as folder:
        kept = Checkpoints(Path(folder), {}, retention=Retention(1))
        kept.save(STEPS // 2, state, {})
        kept.wait()
        target = begin(there)[1]
        restored = kept.restore(STEPS // 2, target)
        kept.close()
    same_place = all(
        a.sharding == b.sharding
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True)
    )
    exact = arrays.digest(restored) == arrays.digest(state)
    end, _ = trained(there, restored)
    whole, _ = trained(here)
    return {"exact": exact, "same_place": same_place, "distance": distance(end, whole)}


def adapted(data: int, fsdp: int, *, scanned: bool = False) -> TrainState:
    """Adapters trained beside parameters that are spread and stay as they are."""
    config = configured(data, fsdp, "adamw")
    config = msgspec.structs.replace(
        config,
        model=msgspec.structs.replace(config.model, layers=3),
        lora=LoraConfig(rank=2),
        training=msgspec.structs.replace(config.training, fused=False, scan_layers=scanned),
    )
    vocabulary, device = ByteTokenizer.vocab_size, devices.use("cpu")
    spec = setup.step_spec(config, vocabulary, device)
    frozen = decoder.init(config.model, vocabulary, 0)
    if scanned:
        frozen = decoder.stack(frozen)
    if spec.mesh is not None:
        frozen = jax.device_put(frozen, meshes.shardings(frozen, spec.mesh))
    state = setup.fresh(spec, lora.init(config.model, vocabulary, config.lora, 0), device)
    rows = packing.lay_out_rows(TOKENIZED, config.data, 64)
    stream = batches.TrainBatches(rows, batch_size=8, seed=0)
    for step in range(STEPS):
        state, _ = train_step(state, stream.at(step), frozen, spec=spec)
    return state


def main() -> None:
    found = {}
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
