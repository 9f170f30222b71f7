"""One optimizer update, and one evaluation batch: pure functions, jitted once here.

Only :class:`~tunix_mlflow.training.trainer.Trainer` calls them.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from tunix_mlflow.input.batches import Batch
from tunix_mlflow.models import decoder, lora
from tunix_mlflow.models.decoder import Params, as_type
from tunix_mlflow.training import mesh as meshes
from tunix_mlflow.training.losses import token_losses
from tunix_mlflow.training.spec import StepSpec
from tunix_mlflow.training.state import TrainState


class StepMetrics(NamedTuple):
    """Scalars of one update, still on the device."""

    loss: jax.Array
    grad_norm: jax.Array
    trained_tokens: jax.Array


_Sums = tuple[Params, jax.Array, jax.Array]  # gradients, loss, trained tokens


@partial(jax.jit, static_argnames="spec", donate_argnames="state")
def train_step(
    state: TrainState, batch: Batch, frozen: Params | None = None, *, spec: StepSpec
) -> tuple[TrainState, StepMetrics]:
    """Compute one update on one batch.

    Gradients are summed over microbatches, one after the other, and over devices, and divided
    by the number of trained tokens of the whole batch: the split changes the memory and the
    speed, not the mean.

    Args:
        state: donated.
        batch: [B, T] arrays; B is a multiple of the microbatches of all devices.
        frozen: the parameters beside adapters, in the layout of `spec.graph`; None: all are
            trained.
        spec: how the update is computed.

    Returns:
        The next state and the loss (nats per trained token), the gradient's global norm
        before clipping, and the number of trained tokens.
    """
    dropout_key = None
    if spec.dropout_seed is not None:
        dropout_key = jax.random.fold_in(jax.random.key(spec.dropout_seed), state.step)
    grads, loss, count = _sums(state.params, frozen, batch, dropout_key, spec)
    grads = jax.tree.map(lambda g: g / count, grads)
    norm = optax.tree.norm(grads)
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
    updates, opt_state = spec.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = StepMetrics(loss / count, norm, count)
    return TrainState(state.step + 1, params, opt_state), metrics


@jax.jit
def is_finite(params: Params) -> jax.Array:
    """Return whether every parameter is finite, as a bool scalar."""
    return jnp.isfinite(optax.tree.norm(params))


@partial(jax.jit, static_argnames="spec")
def eval_step(
    params: Params, batch: Batch, frozen: Params | None = None, *, spec: StepSpec
) -> tuple[jax.Array, jax.Array]:
    """Return the summed loss and the trained tokens of one batch; the caller divides once."""
    if spec.mesh is not None:
        rows = jax.sharding.NamedSharding(spec.mesh, meshes.ROWS)
        batch = jax.lax.with_sharding_constraint(batch, rows)
    cast = as_type(to_compute_layout(as_type(params, "float32"), spec), spec.policy.dtype)
    frozen = cast_frozen(frozen, spec)
    return token_losses(spec.graph, lora.joined(cast, frozen), batch, spec.policy)


def to_compute_layout(params: Params, spec: StepSpec) -> Params:
    """Return trained parameters in the layout of `spec.graph`: fused, stacked, or as they are."""
    params = params if spec.fuse is None else decoder.fuse(params, spec.fuse)
    return decoder.stack(params) if spec.stack else params


def cast_frozen(frozen: Params | None, spec: StepSpec) -> Params | None:
    """Return the parameters beside adapters in the type that the step computes in."""
    return None if frozen is None else as_type(frozen, spec.policy.dtype)


def _sums(
    params: Params,
    frozen: Params | None,
    batch: Batch,
    dropout_key: jax.Array | None,
    spec: StepSpec,
) -> _Sums:
    """Return the sums over a whole batch, float32."""
    mesh = spec.mesh
    if mesh is None:
        return _microbatch_sums(params, frozen, batch, dropout_key, spec)
    param_specs, frozen_specs = meshes.specs(params, mesh), meshes.specs(frozen, mesh)

    def on_one_device(shard: Params, frozen_shard: Params | None, rows: Batch) -> _Sums:
        gathered = jax.tree.map(meshes.gathered, shard, param_specs)
        gathered_frozen = jax.tree.map(meshes.gathered, frozen_shard, frozen_specs)
        key = None
        if dropout_key is not None:
            key = jax.random.fold_in(dropout_key, meshes.device_index(mesh))
        grads, loss, count = _microbatch_sums(gathered, gathered_frozen, rows, key, spec)
        return (
            jax.tree.map(meshes.reduced, grads, param_specs),
            jax.lax.psum(loss, mesh.axis_names),
            jax.lax.psum(count, mesh.axis_names),
        )

    replicated = PartitionSpec()
    sharded = jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(param_specs, frozen_specs, meshes.ROWS),
        out_specs=(param_specs, replicated, replicated),
        check_vma=False,
    )
    sums: _Sums = sharded(params, frozen, batch)
    return sums


def _microbatch_sums(
    params: Params,
    frozen: Params | None,
    batch: Batch,
    dropout_key: jax.Array | None,
    spec: StepSpec,
) -> _Sums:
    """Return the sums over the microbatches of one device, one after the other."""
    # The layout is made once an update, not once a microbatch; its gradient is float32.
    laid_out, layout_vjp = jax.vjp(
        lambda params: to_compute_layout(params, spec), as_type(params, "float32")
    )
    cast, frozen = as_type(laid_out, spec.policy.dtype), cast_frozen(frozen, spec)

    def loss_of(params: Params, part: Batch, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        return token_losses(spec.graph, lora.joined(params, frozen), part, spec.policy, key)

    def sums(part: Batch, index: jax.Array) -> _Sums:
        (loss, count), grads = jax.value_and_grad(loss_of, has_aux=True)(cast, part, index)
        return as_type(grads, "float32"), loss, count

    def add(total: _Sums, part: tuple[Batch, jax.Array]) -> tuple[_Sums, None]:
        return jax.tree.map(jnp.add, total, sums(*part)), None

    if spec.microbatches == 1:
        grads, loss, count = sums(batch, jnp.zeros((), jnp.int32))
    else:
        parts = jax.tree.map(lambda x: x.reshape(spec.microbatches, -1, *x.shape[1:]), batch)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), cast)
        init = (zeros, jnp.zeros(()), jnp.zeros(()))
        indexed = (parts, jnp.arange(spec.microbatches))
        (grads, loss, count), _ = jax.lax.scan(add, init, indexed)
    (grads,) = layout_vjp(grads)
    return grads, loss, count
