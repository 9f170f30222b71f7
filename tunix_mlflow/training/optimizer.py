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
    """Return the learning rate of each update: a linear warm-up to `peak`, then a cosine.

    The first update has peak / warm-up steps, and the last one `final_fraction` of the peak. A
    warm-up takes at most half of the updates, so that a short run decays too.

    Args:
        config: warm-up, final fraction and, if it is not `steps`, the length of the schedule.
        peak: the highest learning rate.
        steps: updates of the run.
    """
    last = max((config.schedule_steps or steps) - 1, 1)
    warmup = min(config.warmup_steps, (last + 1) // 2)
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / warmup if warmup else peak,
        peak_value=peak,
        warmup_steps=max(warmup - 1, 0),
        decay_steps=last,
        end_value=peak * config.final_fraction,
    )


def learning_rates(config: OptimizerConfig, steps: int) -> npt.NDArray[np.float32]:
    """Return the main learning rate of every update, [steps]."""
    rates = jax.jit(schedule(config, config.learning_rate, steps))(np.arange(steps))
    return np.asarray(rates, np.float32)


def change_of_rate(
    step: int, before: tuple[OptimizerConfig, int], after: tuple[OptimizerConfig, int]
) -> str | None:
    """Return how the learning rate changes when a run gets another schedule or number of steps.

    Args:
        step: updates that are done.
        before: configuration and steps that the run had so far.
        after: those that it has from now on.

    Returns:
        A line, or None if the rate of the next update stays within a hundredth.
    """
    (_, had), (config, has) = before, after
    if not 0 < step < has or before == after:
        return None
    done, planned = learning_rates(*before), learning_rates(*after)
    last, following = float(done[min(step, had) - 1]), float(planned[step])
    expected = float(done[step]) if step < had else last
    if abs(following - expected) <= 0.01 * expected:
        return None
    length = before[0].schedule_steps or had
    what = f"training.steps={has}"
    if config.schedule_steps is not None:
        what = f"optimizer.schedule_steps={config.schedule_steps}"
    return (
        f"{what} changes the schedule: update {step} had a learning rate of {last:.3g}, and update"
        f" {step + 1} has {following:.3g}. optimizer.schedule_steps={length} keeps the schedule of"
        f" {length} steps, and continues with its last rate, {config.final_fraction:g} of the peak"
    )


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
