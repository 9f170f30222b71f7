"""The state of a training: made on its devices, or described without computing anything."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding

from tunix_mlflow.config.schema import Config
from tunix_mlflow.models import decoder, lora
from tunix_mlflow.models.decoder import Params
from tunix_mlflow.models.hub import base as bases
from tunix_mlflow.models.hub import names
from tunix_mlflow.models.hub.base import Base
from tunix_mlflow.training import mesh as meshes
from tunix_mlflow.training.spec import StepSpec

_T = TypeVar("_T")


class TrainState(NamedTuple):
    """What a checkpoint holds.

    The batch of a step, and what dropout leaves out, are functions of the seed and the step alone,
    so this is the whole state.
    """

    step: jax.Array  # int32 scalar: updates done
    params: Params  # those that are trained: all, or adapters
    opt_state: optax.OptState


class InitialState(NamedTuple):
    """The state before the first update, and what stays beside it."""

    state: TrainState
    frozen: Params | None  # the parameters beside adapters, in the layout that the step wants
    base_digest: str | None  # sha256 of the base model's weights


def init_state(spec: StepSpec, params: Params, device: jax.Device) -> TrainState:
    """Return the state before the first update of parameters that are to be trained.

    Args:
        spec: with its optimizer and its mesh.
        params: on any device; with a mesh NumPy arrays, so that no device holds all of them.
        device: where the state goes, without a mesh.
    """
    if spec.mesh is None:
        placed = jax.device_put(params, device)
        state: TrainState = _init(placed, spec.optimizer)
        return state
    shapes = jax.eval_shape(partial(_init, optimizer=spec.optimizer), params)
    shardings = meshes.shardings(shapes, spec.mesh)
    placed = jax.device_put(params, shardings.params)
    init = jax.jit(_init, static_argnames="optimizer", out_shardings=shardings)
    sharded: TrainState = init(placed, optimizer=spec.optimizer)
    return sharded


def load_state(
    spec: StepSpec, config: Config, vocab_size: int, device: jax.Device, base: Base | None
) -> InitialState:
    """Read or draw the parameters, and return the state before the first update.

    Raises:
        ModelError: if the base model cannot be read.
    """
    dtype = config.training.param_dtype
    if base is None:
        params = decoder.as_type(decoder.init(config.model, vocab_size, config.seed), dtype)
        return InitialState(init_state(spec, params, device), None, None)
    shapes = decoder.shape(config.model, vocab_size)[1]
    placements = iter(jax.tree.leaves(_placements(spec, shapes, device)))

    def place(array: names.Array, _: object) -> jax.Array:
        placed: jax.Array = jax.device_put(array.astype(dtype, copy=False), next(placements))
        return placed

    params, digest = bases.load(base, place)
    if not config.lora.rank:
        return InitialState(init_state(spec, params, device), None, digest)
    adapters = lora.init(config.model, vocab_size, config.lora, config.seed)
    if spec.stack:
        params = decoder.stack(params, consume=True)
        params = jax.device_put(params, _placements(spec, params, device))
    return InitialState(init_state(spec, adapters, device), params, digest)


def abstract_state(
    spec: StepSpec, config: Config, vocab_size: int, device: jax.Device
) -> tuple[TrainState, Params | None]:
    """Return state and frozen parameters as shapes, types and placements; compute nothing."""
    dtype = config.training.param_dtype
    params = _typed(decoder.shape(config.model, vocab_size)[1], dtype)
    frozen = None
    if config.lora.rank:
        frozen = jax.eval_shape(decoder.stack, params) if spec.stack else params
        params = _typed(lora.shape(config.model, vocab_size, config.lora), "float32")
    state = jax.eval_shape(partial(_init, optimizer=spec.optimizer), params)
    both = state, frozen
    placed: tuple[TrainState, Params | None] = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        both,
        _placements(spec, both, device),
    )
    return placed


@partial(jax.jit, static_argnames="optimizer")
def _init(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def _typed(shapes: Params, dtype: str) -> Params:
    typed: Params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
    return typed


def _placements(spec: StepSpec, tree: _T, device: jax.Device) -> _T:
    """The sharding of every array. All are committed, or the second update compiles again."""
    if spec.mesh is not None:
        return meshes.shardings(tree, spec.mesh)
    single = SingleDeviceSharding(device)
    shardings: _T = jax.tree.map(lambda _: single, tree)
    return shardings
