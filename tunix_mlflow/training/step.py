"""One optimizer update, and one held-out batch: pure functions, jitted once here."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from tunix_mlflow.config import ModelConfig
from tunix_mlflow.data.batches import Batch
from tunix_mlflow.models import decoder, lora
from tunix_mlflow.models.decoder import Graph, Params, as_type
from tunix_mlflow.training import mesh as meshes
from tunix_mlflow.training.losses import PLAIN, Compute, token_losses


class TrainState(NamedTuple):
    """What a checkpoint holds.

    The batch of a step, and what an adapter leaves out, are functions of the seed and the step
    alone, so this is the whole state.
    """

    step: jax.Array  # int32 scalar: updates done
    params: Params  # those that are trained: all, or adapters
    opt_state: optax.OptState


class Plan(NamedTuple):
    """How updates are computed: all that is fixed when the step is compiled."""

    graph: Graph
    optimizer: optax.GradientTransformation
    microbatches: int = 1  # of one update, on each device
    mesh: Mesh | None = None  # None: one device
    compute: Compute = PLAIN
    fuse: ModelConfig | None = None  # the model's shape, where `graph` is its fused form
    stack: bool = False  # whether `graph` is the scanned form
    noise: int | None = None  # a seed, where adapters leave out inputs at random


class StepMetrics(NamedTuple):
    """Scalars of one update, still on the device."""

    loss: jax.Array
    grad_norm: jax.Array
    trained_tokens: jax.Array


_Sums = tuple[Params, jax.Array, jax.Array]  # gradients, loss, trained tokens


@partial(jax.jit, static_argnames="optimizer")
def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def init_spread(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The same over a mesh, of NumPy arrays: no device holds the whole."""
    spread = meshes.shardings(
        jax.eval_shape(partial(init_state, optimizer=optimizer), params), mesh
    )
    placed = jax.device_put(params, spread.params)
    make = jax.jit(init_state, static_argnames="optimizer", out_shardings=spread)
    made: TrainState = make(placed, optimizer=optimizer)
    return made


@partial(jax.jit, static_argnames="plan", donate_argnames="state")
def train_step(
    state: TrainState, batch: Batch, frozen: Params | None = None, *, plan: Plan
) -> tuple[TrainState, StepMetrics]:
    """One update on one batch.

    Gradients are summed over microbatches, one after the other, and over devices, and divided
    by the number of trained tokens of the whole batch: the split changes the memory and the
    speed, not the mean.

    Args:
        state: donated.
        batch: [B, T] arrays; B is a multiple of the microbatches of all devices.
        frozen: the parameters beside adapters, as `plan.graph` wants them; None: all are trained.
        plan: how.

    Returns:
        The next state and the loss (nats per trained token), the gradient's global norm
        before clipping, and the number of trained tokens.
    """
    noise = None
    if plan.noise is not None:
        noise = jax.random.fold_in(jax.random.key(plan.noise), state.step)
    grads, loss, count = _sums(state.params, frozen, batch, noise, plan)
    grads = jax.tree.map(lambda g: g / count, grads)
    norm = optax.tree.norm(grads)
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
    updates, opt_state = plan.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = StepMetrics(loss / count, norm, count)
    return TrainState(state.step + 1, params, opt_state), metrics


def compile_step(
    state: TrainState, batch: Batch, frozen: Params | None = None, *, plan: Plan
) -> None:
    """Compile :func:`train_step` for such arguments; calls with them use what was made."""
    train_step.lower(state, batch, frozen, plan=plan).compile()


@jax.jit
def is_finite(params: Params) -> jax.Array:
    """Whether every parameter is a number, as a bool scalar."""
    return jnp.isfinite(optax.tree.norm(params))


@partial(jax.jit, static_argnames="plan")
def eval_step(
    params: Params, batch: Batch, frozen: Params | None = None, *, plan: Plan
) -> tuple[jax.Array, jax.Array]:
    """Summed loss and trained tokens of one held-out batch; the caller divides once."""
    if plan.mesh is not None:
        rows = jax.sharding.NamedSharding(plan.mesh, meshes.ROWS)
        batch = jax.lax.with_sharding_constraint(batch, rows)
    ready = as_type(_formed(as_type(params, "float32"), plan), plan.compute.dtype)
    still = _still(frozen, plan)
    return token_losses(plan.graph, lora.joined(ready, still), batch, plan.compute)


def _sums(
    params: Params, frozen: Params | None, batch: Batch, noise: jax.Array | None, plan: Plan
) -> _Sums:
    """Sums over a whole batch, float32."""
    mesh = plan.mesh
    if mesh is None:
        return _scanned(params, frozen, batch, noise, plan)
    specs, still = meshes.specs(params, mesh), meshes.specs(frozen, mesh)

    def on_one_device(part: Params, base: Params | None, rows: Batch) -> _Sums:
        whole = jax.tree.map(meshes.gathered, part, specs)
        base = jax.tree.map(meshes.gathered, base, still)
        own = None if noise is None else jax.random.fold_in(noise, meshes.number(mesh))
        grads, loss, count = _scanned(whole, base, rows, own, plan)
        return (
            jax.tree.map(meshes.reduced, grads, specs),
            jax.lax.psum(loss, mesh.axis_names),
            jax.lax.psum(count, mesh.axis_names),
        )

    everywhere = PartitionSpec()
    spread = jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(specs, still, meshes.ROWS),
        out_specs=(specs, everywhere, everywhere),
        check_vma=False,
    )
    sums: _Sums = spread(params, frozen, batch)
    return sums


def _formed(params: Params, plan: Plan) -> Params:
    """What is trained, as `plan.graph` wants it."""
    formed = params if plan.fuse is None else decoder.fuse(params, plan.fuse)
    return decoder.stack(formed) if plan.stack else formed


def _still(frozen: Params | None, plan: Plan) -> Params | None:
    """The parameters beside adapters, as the products want them."""
    return None if frozen is None else as_type(frozen, plan.compute.dtype)


def _scanned(
    params: Params, frozen: Params | None, batch: Batch, noise: jax.Array | None, plan: Plan
) -> _Sums:
    """Sums over the microbatches of one device, one after the other."""
    # Once an update, not once a microbatch. Gradients go back in float32.
    exact, back = jax.vjp(lambda params: _formed(params, plan), as_type(params, "float32"))
    ready, still = as_type(exact, plan.compute.dtype), _still(frozen, plan)

    def loss_of(params: Params, part: Batch, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        own = None if noise is None else jax.random.fold_in(noise, number)
        return token_losses(plan.graph, lora.joined(params, still), part, plan.compute, own)

    def sums(part: Batch, number: jax.Array) -> _Sums:
        (loss, count), grads = jax.value_and_grad(loss_of, has_aux=True)(ready, part, number)
        return as_type(grads, "float32"), loss, count

    def add(total: _Sums, part: tuple[Batch, jax.Array]) -> tuple[_Sums, None]:
        return jax.tree.map(jnp.add, total, sums(*part)), None

    if plan.microbatches == 1:
        grads, loss, count = sums(batch, jnp.zeros((), jnp.int32))
    else:
        parts = jax.tree.map(lambda x: x.reshape(plan.microbatches, -1, *x.shape[1:]), batch)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), ready)
        numbered = (parts, jnp.arange(plan.microbatches))
        start = (zeros, jnp.zeros(()), jnp.zeros(()))
        (grads, loss, count), _ = jax.lax.scan(add, start, numbered)
    (grads,) = back(grads)
    return grads, loss, count
