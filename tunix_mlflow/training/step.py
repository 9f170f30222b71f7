"""One optimizer update, and one held-out batch: pure functions, jitted once here."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from tunix_mlflow.data.batches import Batch
from tunix_mlflow.models.decoder import Graph, Params
from tunix_mlflow.training.losses import token_losses


class TrainState(NamedTuple):
    """What a checkpoint holds.

    Nothing in a step draws random numbers, and the batch of a step is a function of the
    seed and the step alone, so this is the whole state.
    """

    step: jax.Array  # int32 scalar: updates done
    params: Params
    opt_state: optax.OptState


class StepMetrics(NamedTuple):
    """Scalars of one update, still on the device."""

    loss: jax.Array
    grad_norm: jax.Array
    trained_tokens: jax.Array


@partial(jax.jit, static_argnames="optimizer")
def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


@partial(
    jax.jit,
    static_argnames=("graph", "optimizer", "microbatches"),
    donate_argnames="state",
)
def train_step(
    state: TrainState,
    batch: Batch,
    *,
    graph: Graph,
    optimizer: optax.GradientTransformation,
    microbatches: int,
) -> tuple[TrainState, StepMetrics]:
    """One update on one batch.

    Gradients are summed over `microbatches` equal parts of the batch, one after the other,
    and divided by the number of trained tokens of the whole batch: the split changes the
    memory and the speed, not the mean.

    Args:
        state: donated.
        batch: [B, T] arrays; B is a multiple of `microbatches`.

    Returns:
        The next state and the loss (nats per trained token), the gradient's global norm
        before clipping, and the number of trained tokens.
    """
    parts = jax.tree.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]), batch)

    def loss_of(params: Params, part: Batch) -> tuple[jax.Array, jax.Array]:
        return token_losses(graph, params, part)

    def add(
        total: tuple[Params, jax.Array, jax.Array], part: Batch
    ) -> tuple[tuple[Params, jax.Array, jax.Array], None]:
        (loss, count), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params, part)
        return (
            jax.tree.map(jnp.add, total[0], grads),
            total[1] + loss,
            total[2] + count,
        ), None

    zero = (jax.tree.map(jnp.zeros_like, state.params), jnp.zeros(()), jnp.zeros(()))
    (grads, loss, count), _ = jax.lax.scan(add, zero, parts)
    grads = jax.tree.map(lambda g: g / count, grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = StepMetrics(loss / count, optax.tree.norm(grads), count)
    return TrainState(state.step + 1, params, opt_state), metrics


@jax.jit
def is_finite(params: Params) -> jax.Array:
    """Whether every parameter is a number, as a bool scalar."""
    return jnp.isfinite(optax.tree.norm(params))


@partial(jax.jit, static_argnames="graph")
def eval_step(params: Params, batch: Batch, *, graph: Graph) -> tuple[jax.Array, jax.Array]:
    """Summed loss and trained tokens of one held-out batch; the caller divides once."""
    return token_losses(graph, params, batch)
