"""How updates are computed: everything that is fixed when the step is compiled."""

from __future__ import annotations

from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh

from tunix_mlflow.config.schema import Config, ModelConfig
from tunix_mlflow.models import decoder
from tunix_mlflow.models.decoder import Graph
from tunix_mlflow.runtime import devices
from tunix_mlflow.training import mesh as meshes
from tunix_mlflow.training import optimizer
from tunix_mlflow.training.losses import FLOAT32, PrecisionPolicy


class StepSpec(NamedTuple):
    """The static part of an update; hashable, a static argument of the compiled step."""

    graph: Graph
    optimizer: optax.GradientTransformation
    microbatches: int = 1  # of one update, on each device
    mesh: Mesh | None = None  # None: one device
    policy: PrecisionPolicy = FLOAT32
    fuse: ModelConfig | None = None  # the model's shape, where `graph` is its fused form
    stack: bool = False  # whether `graph` is the scanned form
    dropout_seed: int | None = None  # of LoRA's dropout; None: no dropout


def step_spec(config: Config, vocab_size: int, device: jax.Device) -> StepSpec:
    """Return how a resolved configuration is trained.

    Raises:
        DeviceError: if there are fewer devices than the mesh needs.
    """
    training = config.training
    graph = decoder.shape(
        config.model,
        vocab_size,
        fused=bool(training.fused),
        scanned=bool(training.scan_layers),
        lora=config.lora if config.lora.rank else None,
    )[0]
    return StepSpec(
        graph,
        optimizer.build(config.optimizer, training.steps),
        config.microbatches,
        meshes.build(config.mesh, devices.group(device, config.mesh.size)),
        PrecisionPolicy(training.compute_dtype, training.remat, training.loss_chunk or 0),
        config.model if training.fused else None,
        bool(training.scan_layers),
        config.seed if config.lora.rank and config.lora.dropout else None,
    )
