"""Trains a few steps on several meshes of four virtual devices; prints what came out as JSON.

In a process of its own: jax counts devices once, when it starts.
"""

from __future__ import annotations

import json
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import msgspec
import numpy as np

from tunix_mlflow.config.load import resolve
from tunix_mlflow.config.schema import Config, DataConfig, LoraConfig
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
from tunix_mlflow.training.state import InitialState, init_state, load_state
from tunix_mlflow.training.trainer import Trainer

STEPS = 4
# Rows of unequal token counts, so that a mean over devices would show.
EXAMPLES = [reasoning_trace(f"n{n}", [("t", "s" * n)], f"{n}").example() for n in range(1, 30)]
TOKENIZED = encode_examples(EXAMPLES, ByteTokenizer(), DataConfig())

VOCABULARY = ByteTokenizer.vocab_size


class Grid(NamedTuple):
    """Devices, and what they train with."""

    data: int
    fsdp: int
    optimizer: str = "adamw"


ALONE = Grid(1, 1)


def configured(grid: Grid) -> Config:
    tree = {
        "model": {"layers": 1, "width": 16, "heads": 2, "kv_heads": 1, "mlp_width": 24},
        "data": {"sequence_length": 64, "packing": False},
        "training": {"steps": STEPS, "batch_size": 8, "microbatch_size": 1},
        "optimizer": {"name": grid.optimizer, "warmup_steps": 0},
        "mesh": {"data": grid.data, "fsdp": grid.fsdp},
    }
    return resolve_auto(resolve(tree, "the test"), VOCABULARY, "cpu")


@lru_cache
def compiled(grid: Grid) -> Trainer:
    """One trainer of each grid: its step is compiled once."""
    return Trainer.create(configured(grid), VOCABULARY, devices.use("cpu"))


def new_trainer(grid: Grid) -> Trainer:
    """The trainer of a grid, at its first update again."""
    trainer = compiled(grid)
    initial = load_state(trainer.spec, trainer.config, VOCABULARY, trainer.device, None)
    trainer.state = initial.state
    return trainer


def train(trainer: Trainer, steps: int = STEPS) -> list[float]:
    """The losses of the updates up to `steps`."""
    rows = lay_out_rows(TOKENIZED, trainer.config.data, 64)
    stream = TrainBatches(rows, batch_size=8, seed=0)
    return [float(trainer.step(stream.at(step)).loss) for step in range(trainer.updates, steps)]


class Trained(NamedTuple):
    """The end of a training; arrays may be donated afterwards, so they are copied."""

    params: list[np.ndarray]
    digest: str
    losses: list[float]
    share: float  # of the parameters, on the first device


def trained(trainer: Trainer) -> Trained:
    losses = train(trainer)
    leaves = jax.tree.leaves(trainer.state.params)
    held = sum(leaf.addressable_shards[0].data.size for leaf in leaves)
    return Trained(
        [np.array(leaf) for leaf in leaves],
        arrays.digest(trainer.state),
        losses,
        held / sum(leaf.size for leaf in leaves),
    )


def distance(a: Trained, b: Trained) -> float:
    pairs = zip(a.params, b.params, strict=True)
    return max(float(np.max(np.abs(x - y))) for x, y in pairs)


def moved(here: Grid, there: Grid, uninterrupted: Trained) -> dict[str, Any]:
    """Trained on a mesh, saved, restored on another, trained on there."""
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
    distance_at_the_end = distance(trained(other), uninterrupted)
    return {"exact": exact, "same_place": same_place, "distance": distance_at_the_end}


def adapted(grid: Grid, *, scanned: bool = False) -> Trained:
    """Adapters trained beside frozen parameters that are sharded."""
    config = configured(grid)
    config = msgspec.structs.replace(
        config,
        model=msgspec.structs.replace(config.model, layers=2),
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
    return trained(Trainer(config, VOCABULARY, device, spec, initial))


def main() -> None:
    ends: dict[Grid, Trained] = {}
    found: dict[str, Any] = {}
    for optimizer, grids in (("adamw", ((2, 1), (1, 4), (2, 2))), ("muon", ((2, 2),))):
        alone = trained(new_trainer(Grid(1, 1, optimizer)))
        for data, fsdp in grids:
            grid = Grid(data, fsdp, optimizer)
            ends[grid] = end = trained(new_trainer(grid))
            found[f"{optimizer} {data}x{fsdp}"] = {
                "distance": distance(alone, end),
                "loss": max(abs(a - b) for a, b in zip(alone.losses, end.losses, strict=True)),
                "again": trained(new_trainer(grid)).digest == end.digest,
                "share": end.share,
            }
    here = Grid(2, 2)
    found["moved"] = {
        f"{there.data}x{there.fsdp}": moved(here, there, ends[here])
        for there in (Grid(1, 4), ALONE)
    }
    plain = adapted(ALONE)
    found["adapted"] = distance(plain, adapted(here))
    found["scanned"] = distance(plain, adapted(here, scanned=True))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
