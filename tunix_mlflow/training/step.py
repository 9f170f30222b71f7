"""One optimizer update, and one held-out batch: pure functions, jitted once here."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from tunix_mlflow.config.schema import ModelConfig
from tunix_mlflow.input.batches import Batch
from tunix_mlflow.models import decoder, lora
from tunix_mlflow.models.decoder import Graph, Params, as_type
from tunix_mlflow.training import mesh as meshes
from tunix_mlflow.training.losses import FLOAT32, PrecisionPolicy, token_losses


class TrainState(NamedTuple):
    """What a checkpoint holds.

    The batch of a step, and what an adapter leaves out, are functions of the seed and the step
    alone, so this is the whole state.
    """

    step: jax.Array  # int32 scalar: updates done
    params: Params  # those that are trained: all, or adapters
    opt_state: optax.OptState


class StepSpec(NamedTuple):
    """How updates are computed: all that is fixed when the step is compiled."""

    graph: Graph
    optimizer: optax.GradientTransformation
    microbatches: int = 1  # of one update, on each device
    mesh: Mesh | None = None  # None: one device
    policy: PrecisionPolicy = FLOAT32
    fuse: ModelConfig | None = None  # the model's shape, where `graph` is its fused form
    stack: bool = False  # whether `graph` is the scanned form
    dropout_key: int | None = None  # a seed, where adapters leave out inputs at random


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


@partial(jax.jit, static_argnames="spec", donate_argnames="state")
def train_step(
    state: TrainState, batch: Batch, frozen: Params | None = None, *, spec: StepSpec
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
    dropout_key = None
    if spec.dropout_key is not None:
        dropout_key = jax.random.fold_in(jax.random.key(spec.dropout_key), state.step)
    grads, loss, count = _sums(state.params, frozen, batch, dropout_key, spec)
    grads = jax.tree.map(lambda g: g / count, grads)
    norm = optax.tree.norm(grads)
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
    updates, opt_state = spec.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = StepMetrics(loss / count, norm, count)
    return TrainState(state.step + 1, params, opt_state), metrics


def compile_step(
    state: TrainState, batch: Batch, frozen: Params | None = None, *, spec: StepSpec
) -> None:
    """Compile :func:`train_step` for such arguments; calls with them use what was made."""
    train_step.lower(state, batch, frozen, spec=spec).compile()


@jax.jit
def is_finite(params: Params) -> jax.Array:
    """Whether every parameter is a number, as a bool scalar."""
    return jnp.isfinite(optax.tree.norm(params))


@partial(jax.jit, static_argnames="spec")
def eval_step(
    params: Params, batch: Batch, frozen: Params | None = None, *, spec: StepSpec
) -> tuple[jax.Array, jax.Array]:
    """Summed loss and trained tokens of one held-out batch; the caller divides once."""
    if spec.mesh is not None:
        rows = jax.sharding.NamedSharding(spec.mesh, meshes.ROWS)
        batch = jax.lax.with_sharding_constraint(batch, rows)
    ready = as_type(to_compute_layout(as_type(params, "float32"), spec), spec.policy.dtype)
    still = cast_frozen(frozen, spec)
    return token_losses(spec.graph, lora.joined(ready, still), batch, spec.policy)


def _sums(
    params: Params,
    frozen: Params | None,
    batch: Batch,
    dropout_key: jax.Array | None,
    spec: StepSpec,
) -> _Sums:
    """Sums over a whole batch, float32."""
    mesh = spec.mesh
    if mesh is None:
        return _scanned(params, frozen, batch, dropout_key, spec)
    specs, still = meshes.specs(params, mesh), meshes.specs(frozen, mesh)

    def on_one_device(part: Params, base: Params | None, rows: Batch) -> _Sums:
        whole = jax.tree.map(meshes.gathered, part, specs)
        base = jax.tree.map(meshes.gathered, base, still)
        own = None if dropout_key is None else jax.random.fold_in(dropout_key, meshes.number(mesh))
        grads, loss, count = _scanned(whole, base, rows, own, spec)
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


def to_compute_layout(params: Params, spec: StepSpec) -> Params:
    """What is trained, as `plan.graph` wants it."""
    formed = params if spec.fuse is None else decoder.fuse(params, spec.fuse)
    return decoder.stack(formed) if spec.stack else formed


def cast_frozen(frozen: Params | None, spec: StepSpec) -> Params | None:
    """The parameters beside adapters, as the products want them."""
    return None if frozen is None else as_type(frozen, spec.policy.dtype)


def _scanned(
    params: Params,
    frozen: Params | None,
    batch: Batch,
    dropout_key: jax.Array | None,
    spec: StepSpec,
) -> _Sums:
    """Sums over the microbatches of one device, one after the other."""
    # Once an update, not once a microbatch. Gradients go back in float32.
    exact, back = jax.vjp(
        lambda params: to_compute_layout(params, spec), as_type(params, "float32")
    )
    ready, still = as_type(exact, spec.policy.dtype), cast_frozen(frozen, spec)

    def loss_of(params: Params, part: Batch, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        own = None if dropout_key is None else jax.random.fold_in(dropout_key, number)
        return token_losses(spec.graph, lora.joined(params, still), part, spec.policy, own)

    def sums(part: Batch, number: jax.Array) -> _Sums:
        (loss, count), grads = jax.value_and_grad(loss_of, has_aux=True)(ready, part, number)
        return as_type(grads, "float32"), loss, count

    def add(total: _Sums, part: tuple[Batch, jax.Array]) -> tuple[_Sums, None]:
        return jax.tree.map(jnp.add, total, sums(*part)), None

    if spec.microbatches == 1:
        grads, loss, count = sums(batch, jnp.zeros((), jnp.int32))
    else:
        parts = jax.tree.map(lambda x: x.reshape(spec.microbatches, -1, *x.shape[1:]), batch)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), ready)
        numbered = (parts, jnp.arange(spec.microbatches))
        start = (zeros, jnp.zeros(()), jnp.zeros(()))
        (grads, loss, count), _ = jax.lax.scan(add, start, numbered)
    (grads,) = back(grads)
    return grads, loss, count
