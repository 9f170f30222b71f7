"""AdamW and Muon behind one schedule: warm-up, then cosine; global-norm clipping."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import numpy.typing as npt
import optax

from tunix_mlflow.config.schema import OptimizerConfig
from tunix_mlflow.models.decoder import Params


def schedule(config: OptimizerConfig, peak: float, steps: int) -> optax.Schedule:
    """Return a linear warm-up from 0 to `peak`, then a cosine to `final_fraction` of it."""
    warmup = min(config.warmup_steps, max(steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else peak,
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=peak * config.final_fraction,
    )


def learning_rates(config: OptimizerConfig, steps: int) -> npt.NDArray[np.float32]:
    """Return the main learning rate of every update, [steps]."""
    rates = jax.jit(schedule(config, config.learning_rate, steps))(np.arange(steps))
    return np.asarray(rates, np.float32)


def build(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Return the gradient transformation.

    Muon (Jordan 2024, `optax.contrib.muon`) takes the hidden matrices; embeddings, norms
    and the output projection go to AdamW (Loshchilov and Hutter 2019). Weight decay is on
    matrices only.
    """
    rate = schedule(config, config.learning_rate, steps)
    if config.name == "adamw":
        rule = optax.adamw(
            rate,
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=_is_matrix,
        )
    else:
        rule = optax.contrib.muon(
            rate,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_weight_decay=0.0,
            adam_learning_rate=schedule(config, config.adam_learning_rate, steps),
            muon_weight_dimension_numbers=_muon_dimensions,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)


def _is_matrix(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def _muon_dimensions(params: Params) -> Any:
    def choose(path: Any, leaf: jax.Array) -> Any:
        name = jax.tree_util.keystr(path)
        hidden = leaf.ndim == 2 and "embedding" not in name
        return optax.contrib.MuonDimensionNumbers() if hidden else None

    return jax.tree_util.tree_map_with_path(choose, params)
