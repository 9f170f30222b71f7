"""AdamW and Muon behind one schedule: warm-up, then cosine; global-norm clipping."""

from __future__ import annotations

from typing import Any

import jax
import msgspec
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
    (config, had), has = before, after[1]
    if not 0 < step < has or before == after:
        return None
    # How it would go on: past the end of its schedule with the last rate.
    length = config.schedule_steps or had
    kept = msgspec.structs.replace(config, schedule_steps=length)
    goes_on, planned = learning_rates(kept, step + 1), learning_rates(*after)
    expected, following = float(goes_on[step]), float(planned[step])
    if abs(following - expected) <= 0.01 * expected:
        return None
    what = f"training.steps={has}"
    if after[0].schedule_steps is not None:
        what = f"optimizer.schedule_steps={after[0].schedule_steps}"
    ended = ", which has ended: the remaining updates have its last rate" if step >= length else ""
    return (
        f"{what} changes the schedule: update {step} had a learning rate of"
        f" {float(goes_on[step - 1]):.3g}, and update {step + 1} has {following:.3g}."
        f" optimizer.schedule_steps={length} keeps the schedule of {length} steps{ended}"
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
