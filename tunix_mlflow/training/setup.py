"""From a dataset and a configuration to everything that the loop works with."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import msgspec
from jax.sharding import SingleDeviceSharding

from tunix_mlflow.config.identity import trajectory_digest
from tunix_mlflow.config.schema import Config, ModelConfig
from tunix_mlflow.data.examples import Example
from tunix_mlflow.data.manifest import Manifest
from tunix_mlflow.errors import ConfigError, DatasetError
from tunix_mlflow.input import batches, packing, tokens
from tunix_mlflow.input.batches import TrainBatches
from tunix_mlflow.input.packing import TokenRows
from tunix_mlflow.models import decoder, lora
from tunix_mlflow.models.hub import base as bases
from tunix_mlflow.models.hub import names
from tunix_mlflow.models.hub.base import Base
from tunix_mlflow.runtime import devices
from tunix_mlflow.runtime.process import COMPILING
from tunix_mlflow.text.byte_tokenizer import ByteTokenizer
from tunix_mlflow.text.tokenizer import Tokenizer
from tunix_mlflow.training import loop, optimizer, step
from tunix_mlflow.training import mesh as meshes
from tunix_mlflow.training.losses import PrecisionPolicy
from tunix_mlflow.training.step import StepSpec, TrainState

_T = TypeVar("_T")
_CPU_TOKENS, _CPU_ADAPTED = 512, 256
"""Of a microbatch on a CPU: what it works on stays in the cache. Beside adapters it is most of what
memory is needed for, so there are fewer."""
_FUSED_TOKENS = 2048
"""Of an update on a CPU, from which on fused products are worth making."""
_UNROLLED = 16
"""Blocks that are compiled one by one, off a CPU."""
_LOGITS_BYTES = 256 * 2**20
"""Logits that are held at a time, where nothing is configured."""


class Inputs(NamedTuple):
    """What a run trains on, its configuration with all that was left open, and how it computes; no
    weights yet."""

    config: Config
    manifest: Manifest
    tokenizer: Tokenizer
    examples: list[Example]
    held_out: list[Example]
    rows: TokenRows
    held_out_rows: TokenRows | None
    max_new_tokens: int
    device: jax.Device  # the first, of several
    spec: StepSpec

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return self.config.model.vocab_size or self.tokenizer.vocab_size


class Setup(NamedTuple):
    """What a run trains, on what, and how."""

    inputs: Inputs
    state: TrainState  # before the first update
    frozen: decoder.Params | None  # the parameters beside adapters, as `plan.graph` wants them
    base_digest: str | None  # of the weights that it begins with

    @property
    def config(self) -> Config:
        """With what it left open; see :func:`settle`."""
        return self.inputs.config

    @property
    def spec(self) -> StepSpec:
        """How an update is computed."""
        return self.inputs.spec

    def train_batches(self) -> TrainBatches:
        """The batches of every step."""
        return TrainBatches(
            self.inputs.rows, batch_size=self.config.training.batch_size, seed=self.config.seed
        )

    def held_out_loss(self, state: TrainState) -> dict[str, float]:
        """`eval/loss` of a state."""
        assert self.inputs.held_out_rows is not None
        parts = batches.eval_batches(self.inputs.held_out_rows, self.config.training.batch_size)
        return loop.held_out_loss(self.spec, state.params, parts, self.frozen)

    @property
    def graph(self) -> decoder.Graph:
        """The model's plain form, in which it is kept and asked."""
        return decoder.shape(self.config.model, self.inputs.vocab_size)[0]

    def whole(self, state: TrainState) -> decoder.Params:
        """All parameters as a model is logged and asked: plain, on one device, float32.

        Frozen ones in the scanned form are used up: memory may hold them once only.
        """
        params = state.params
        if self.frozen is not None:
            base = self.frozen
            if self.spec.stack:
                base = decoder.unstack(base, consume=True)
            params = lora.merged(params, base, self.config.lora)
        return decoder.as_type(jax.device_put(params, self.inputs.device), "float32")

    def identity(self) -> dict[str, str]:
        """Digests of what decides the path of the parameters."""
        tokenizer = self.inputs.tokenizer
        found = {
            "dataset_digest": self.inputs.manifest.digest,
            "tokenizer_digest": tokenizer.digest,
            "template_digest": tokenizer.template_digest(self.config.data.include_steps),
            "trajectory_digest": trajectory_digest(self.config),
        }
        return found if self.base_digest is None else found | {"base_digest": self.base_digest}

    def fingerprint(self) -> dict[str, str]:
        """What bit-identity depends on besides."""
        rows = {"microbatch_size": str(self.config.training.microbatch_size)}
        return devices.fingerprint(self.inputs.device, self.config.mesh) | rows


def assemble(
    config: Config, manifest: Manifest, device: jax.Device, base: Base | None = None
) -> Setup:
    """All of it; see :func:`read` and :func:`build`."""
    return build(read(config, manifest, device, base), base)


def build(inputs: Inputs, base: Base | None) -> Setup:
    """Read or initialise the parameters.

    Raises:
        ModelError: if the base cannot be read.
    """
    made = start(inputs.spec, inputs.config, inputs.vocab_size, inputs.device, base)
    return Setup(inputs, *made)


def read(
    config: Config, manifest: Manifest, device: jax.Device, base: Base | None = None
) -> Inputs:
    """Read the splits, make rows of tokens, and settle the configuration.

    Args:
        config: the run's.
        manifest: of a dataset that is verified and has a snapshot.
        device: where arrays go.
        base: the pretrained model that `config.base` names.

    Raises:
        ConfigError: if the configuration says another shape than the base has, or adapters
            without a base.
        DatasetError: for a split that is not there, or examples longer than attention can take.
        DeviceError: if there are fewer devices than the mesh needs.
    """
    from tunix_mlflow.data import snapshot  # late: Arrow, which rows in memory do not need

    train, wanted = config.data.train_split, config.evaluation.split
    if train not in manifest.splits:
        raise DatasetError(
            f"dataset {manifest.key} has no split {train!r}; it has {', '.join(manifest.splits)}"
        )
    if wanted not in manifest.splits and (len(manifest.splits) > 1 or wanted != "test"):
        raise DatasetError(
            f"dataset {manifest.key} has no split {wanted!r} to hold out;"
            f" it has {', '.join(manifest.splits)}. Set evaluation.split"
        )
    tokenizer: Tokenizer = ByteTokenizer()
    if base is not None:
        tokenizer, config = base.tokenizer, of_base(config, base)
    splits = snapshot.read_splits(manifest.digest, [train, wanted])
    examples, held_out = splits[train], splits[wanted]
    include = config.data.include_steps
    tokenized = tokens.encode_examples(examples, tokenizer, include)
    tokenized_held_out = tokens.encode_examples(held_out, tokenizer, include)
    if config.data.sequence_length is None:
        config = _with_length(config, tokens.longest(tokenized, tokenized_held_out))
    length = config.data.sequence_length or 0
    longest = config.model.max_positions
    if longest is not None and length > longest:
        raise DatasetError(
            f"data.sequence_length={length} is more than the {longest} tokens that the model was"
            " made for"
        )
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    config = resolve_auto(config, vocab_size, device.platform)
    rows = packing.lay_out_rows(tokenized, config.data, length)
    held_out_rows = None
    if held_out:
        held_out_rows = packing.lay_out_rows(tokenized_held_out, config.data, length)
    return Inputs(
        config=config,
        manifest=manifest,
        tokenizer=tokenizer,
        examples=examples,
        held_out=held_out,
        rows=rows,
        held_out_rows=held_out_rows,
        max_new_tokens=config.evaluation.max_new_tokens or packing.longest_completion(rows),
        device=device,
        spec=step_spec(config, vocab_size, device),
    )


def of_base(config: Config, base: Base) -> Config:
    """The configuration with the shape of its base."""
    if config.model not in (ModelConfig(), base.config):
        raise ConfigError(
            f"model.* says another shape than {config.base} has; leave it out, the base decides it"
        )
    return msgspec.structs.replace(config, model=base.config)


def resolve_auto(config: Config, vocab_size: int, platform: str) -> Config:
    """Choose what the configuration leaves open, of a known sequence length.

    Raises:
        ConfigError: for adapters without a base.
    """
    if config.lora.rank and config.base is None:
        raise ConfigError("lora.rank needs a model to adapt: set base, or lora.rank=0")
    training, length = config.training, config.data.sequence_length or 0
    rows = training.microbatch_size or microbatch(
        training.batch_size // config.mesh.size,
        length,
        platform,
        _CPU_ADAPTED if config.lora.rank else _CPU_TOKENS,
    )
    chunk = training.loss_chunk
    if chunk is None:
        chunk = max(1, _LOGITS_BYTES // (4 * vocab_size))
    fused = training.fused
    if fused is None:
        tokens = training.batch_size // config.mesh.size * length
        fused = platform == "cpu" and tokens >= _FUSED_TOKENS
    fused = fused and not config.lora.rank  # adapters belong to products that stand alone
    scanned = training.scan_layers
    if scanned is None:
        deep = platform != "cpu" and config.model.layers > _UNROLLED
        scanned = deep or training.remat != "none"
    training = msgspec.structs.replace(
        training, microbatch_size=rows, loss_chunk=chunk, fused=fused, scan_layers=scanned
    )
    return msgspec.structs.replace(config, training=training)


def compile_ahead(
    spec: StepSpec, config: Config, vocab_size: int, device: jax.Device
) -> Future[float]:
    """Compile the update in a thread, while parameters are read and the run is opened.

    What is Python's of it is done at once: two threads of Python are no quicker than one, and the
    compiler would wait for it.

    Returns:
        The seconds that it took, or what went wrong.
    """
    begun = time.perf_counter()
    state, frozen = abstract(spec, config, vocab_size, device)
    batch = batches.blank(config.training.batch_size, config.data.sequence_length or 0)
    lowered = step.train_step.lower(state, batch, frozen, spec=spec)
    promised: Future[float] = Future()

    def compiled() -> None:
        try:
            lowered.compile()
        except BaseException as error:
            promised.set_exception(error)
        else:
            promised.set_result(time.perf_counter() - begun)

    # A process that ends does not wait for it; see `bootstrap.run`.
    threading.Thread(target=compiled, name=COMPILING, daemon=True).start()
    return promised


def start(
    spec: StepSpec, config: Config, vocab_size: int, device: jax.Device, base: Base | None
) -> tuple[TrainState, decoder.Params | None, str | None]:
    """The state before the first update, from a base or from scratch.

    Returns:
        Also the parameters that stay as they are beside adapters, and the digest of the base.

    Raises:
        ModelError: if the base cannot be read.
    """
    dtype = config.training.param_dtype
    if base is None:
        params = decoder.as_type(decoder.init(config.model, vocab_size, config.seed), dtype)
        return fresh(spec, params, device), None, None
    like = decoder.shape(config.model, vocab_size)[1]
    places = iter(jax.tree.leaves(_places(spec, like, device)))

    def place(array: names.Array, _: object) -> jax.Array:
        put: jax.Array = jax.device_put(array.astype(dtype, copy=False), next(places))
        return put

    params, digest = bases.load(base, place)
    if not config.lora.rank:
        return fresh(spec, params, device), None, digest
    adapters = lora.init(config.model, vocab_size, config.lora, config.seed)
    if spec.stack:
        params = decoder.stack(params, consume=True)
        params = jax.device_put(params, _places(spec, params, device))
    return fresh(spec, adapters, device), params, digest


def abstract(
    spec: StepSpec, config: Config, vocab_size: int, device: jax.Device
) -> tuple[TrainState, decoder.Params | None]:
    """What :func:`start` makes, with shapes, types and places for arrays; nothing is computed."""
    dtype = config.training.param_dtype
    params = _typed(decoder.shape(config.model, vocab_size)[1], dtype)
    frozen = None
    if config.lora.rank:
        frozen = jax.eval_shape(decoder.stack, params) if spec.stack else params
        params = _typed(lora.shape(config.model, vocab_size, config.lora), "float32")
    state = jax.eval_shape(partial(step.init_state, optimizer=spec.optimizer), params)
    both = state, frozen
    placed: tuple[TrainState, decoder.Params | None] = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        both,
        _places(spec, both, device),
    )
    return placed


def _typed(shapes: decoder.Params, dtype: str) -> decoder.Params:
    typed: decoder.Params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes
    )
    return typed


def _places(spec: StepSpec, tree: _T, device: jax.Device) -> _T:
    """Where each array lies. Said of all, or the second update would be compiled again."""
    if spec.mesh is not None:
        return meshes.shardings(tree, spec.mesh)
    one = SingleDeviceSharding(device)
    places: _T = jax.tree.map(lambda _: one, tree)
    return places


def fresh(spec: StepSpec, params: decoder.Params, device: jax.Device) -> TrainState:
    """The state before the first update, of parameters that are to be trained."""
    if spec.mesh is None:
        placed = jax.device_put(params, device)
        made: TrainState = step.init_state(placed, spec.optimizer)
        return made
    return step.init_spread(params, spec.optimizer, spec.mesh)


def step_spec(config: Config, vocab_size: int, device: jax.Device) -> StepSpec:
    """How a settled configuration is trained.

    Raises:
        DeviceError: if there are fewer devices than the mesh needs.
    """
    training = config.training
    adapters = config.lora if config.lora.rank else None
    scanned = bool(training.scan_layers)
    graph = decoder.shape(
        config.model, vocab_size, fused=bool(training.fused), scanned=scanned, lora=adapters
    )[0]
    return StepSpec(
        graph,
        optimizer.build(config.optimizer, training.steps),
        config.microbatches,
        meshes.build(config.mesh, devices.group(device, config.mesh.size)),
        PrecisionPolicy(training.compute_dtype, training.remat, training.loss_chunk or 0),
        config.model if training.fused else None,
        scanned,
        config.seed if config.lora.rank and config.lora.dropout else None,
    )


def microbatch(batch_size: int, length: int, platform: str, tokens: int = _CPU_TOKENS) -> int:
    """Rows of a microbatch where none is configured: a divisor of a device's `batch_size`.

    By a rule, not by a measurement: it decides the order of sums, and so the bits of a run.
    """
    if platform != "cpu":
        return batch_size
    divisors = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
    return max(n for n in divisors if n * length <= tokens or n == 1)


def _with_length(config: Config, needed: int) -> Config:
    if needed > packing.LONGEST_FIT:
        raise DatasetError(
            f"the longest example of {config.dataset} needs {needed} tokens; attention takes"
            " memory by the square of that. Set data.sequence_length, and if need be"
            " data.overlong=truncate or drop"
        )
    data = msgspec.structs.replace(config.data, sequence_length=packing.fit_length(needed))
    return msgspec.structs.replace(config, data=data)
