"""A decoder-only transformer in Flax NNX, and its parameters in each of its forms.

The plain form has a linear layer for each projection. The fused form (:func:`fuse`) and the
scanned form (:func:`stack`) compute the same, faster or in less memory. Shapes in comments:
B batch, T query length, S key length, K key/value heads, D head width, W model width.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx

from tunix_mlflow.config.schema import LoraConfig, ModelConfig
from tunix_mlflow.models.attention import softcap
from tunix_mlflow.models.layers import (
    AttentionContext,
    Block,
    LayerCache,
    Linear,
    Norm,
    fold_in,
)
from tunix_mlflow.models.rotary import frequencies, rope_sin_cos

Graph: TypeAlias = "nnx.GraphDef[Decoder]"
"""The static part of a decoder: structure, no arrays."""
Params: TypeAlias = "nnx.State[Any, Any]"
"""Its arrays."""

_SAMPLE_SIZE = 1 << 16
_TRUNCATED_STDDEV = 0.87962566103423978  # of a standard normal truncated at 2


class Decoder(nnx.Module):
    """Token ids to next-token logits.

    Args:
        config: sizes and family.
        vocab_size: number of tokens.
        rngs: passed to the layers.
        fused: whether this is the fused form: fewer and larger matmuls; see :func:`fuse`.
        scanned: whether this is the scanned form: a loop over one block; see :func:`stack`. It is
            for training, and takes no cache.
        lora: adapters of the projections that it targets; the fused form has none.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        *,
        rngs: nnx.Rngs,
        fused: bool = False,
        scanned: bool = False,
        lora: LoraConfig | None = None,
    ) -> None:
        self.config = config
        zeros = nnx.initializers.zeros_init()
        self.embedding = nnx.Embed(vocab_size, config.width, embedding_init=zeros, rngs=rngs)
        self.scanned = scanned
        blocks = [
            Block(config, rngs=rngs, fused=fused, lora=lora)
            for _ in range(1 if scanned else config.layers)
        ]
        self.blocks: Any = blocks[0] if scanned else nnx.List(blocks)
        self.final_norm = Norm(config.width, config, scaled=not fused)
        tied = config.tie_embeddings and not fused
        self.unembedding = None if tied else Linear(config.width, vocab_size, rngs)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        cache: list[LayerCache] | None = None,
        cache_index: jax.Array | int = 0,
    ) -> tuple[jax.Array, list[LayerCache]]:
        """Return logits, [B, T, vocab], and the updated cache; see :meth:`features`."""
        x, caches = self.features(tokens, positions, mask, cache, cache_index)
        return self.logits(x), caches

    def features(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        cache: list[LayerCache] | None = None,
        cache_index: jax.Array | int = 0,
        remat: str = "none",
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, list[LayerCache]]:
        """Return what the last layer gives to the unembedding.

        Args:
            tokens: [B, T] int32.
            positions: [B, T] int32, from 0 within each example.
            mask: [B, 1, T, S] bool, true where a query may attend; without a cache never to a
                later key.
            cache: one LayerCache per layer, updated from `cache_index` on; None: no cache.
            cache_index: scalar int32, the slot of the first of `tokens`.
            remat: what the backward pass recomputes of a block (rematerialization): `none`,
                `block` (all of it), `dots` (all but matmuls with parameters).
            dropout_key: for dropout of the adapters' inputs; None: no dropout.

        Returns:
            Features [B, T, W], normalized, and the updated cache, empty without one.
        """
        x = self.embedding(tokens)
        if self.config.scale_embeddings:
            x = x * jnp.asarray(self.config.width**0.5, x.dtype)
        full = AttentionContext(mask, *rope_sin_cos(positions, _frequencies(self.config)))
        windowed = full
        if self.config.windowed_layers:
            window_mask = mask
            if self.config.window is not None:
                queries = cache_index + jnp.arange(tokens.shape[1])
                distance = queries[:, None] - jnp.arange(mask.shape[-1])[None, :]
                window_mask = mask & (distance < self.config.window)
            windowed = AttentionContext(
                window_mask, *rope_sin_cos(positions, _frequencies(self.config, windowed=True))
            )
        if self.scanned:
            return self.final_norm(self._scan(x, full, windowed, remat, dropout_key)), []
        caches: list[LayerCache] = []
        for index, block in enumerate(self.blocks):
            graph, params = nnx.split(block)
            x, layer_cache = _apply_block(
                params,
                x,
                windowed if index in self.config.windowed_layers else full,
                None if cache is None else cache[index],
                cache_index,
                fold_in(dropout_key, index),
                graph=graph,
                remat=remat,
            )
            if layer_cache is not None:
                caches.append(layer_cache)
        return self.final_norm(x), caches

    def _scan(
        self,
        x: jax.Array,
        full: AttentionContext,
        windowed: AttentionContext,
        remat: str,
        dropout_key: jax.Array | None,
    ) -> jax.Array:
        """Apply all blocks in a loop over their stacked parameters."""
        windowed_layers = self.config.windowed_layers
        graph, params = nnx.split(self.blocks)

        def apply(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            params, index, is_windowed = layer
            context = full
            if windowed_layers:
                context = jax.tree.map(partial(jnp.where, is_windowed), windowed, full)
            key = fold_in(dropout_key, index)
            x, _ = _apply_block(params, x, context, None, 0, key, graph=graph, remat=remat)
            return x, None

        indices = np.arange(self.config.layers)
        is_windowed = jnp.asarray(np.isin(indices, windowed_layers))
        return jax.lax.scan(apply, x, (params, jnp.asarray(indices), is_windowed))[0]

    def logits(self, features: jax.Array) -> jax.Array:
        """[..., W] -> [..., vocab]."""
        if self.unembedding is None:
            result = self.embedding.attend(features)
        else:
            result = self.unembedding(features)
        return softcap(result, self.config.logit_softcap)


_REMAT_POLICIES = {
    "block": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@partial(jax.jit, static_argnames=("graph", "remat"))
def _apply_block(
    params: Params,
    x: jax.Array,
    context: AttentionContext,
    cache: LayerCache | None,
    cache_index: jax.Array | int,
    dropout_key: jax.Array | None,
    *,
    graph: nnx.GraphDef[Block],
    remat: str,
) -> tuple[jax.Array, LayerCache | None]:
    """Apply one block. It is jitted by itself, so that equal blocks are traced once."""

    def block(params: Params, x: jax.Array) -> tuple[jax.Array, LayerCache | None]:
        return nnx.merge(graph, params)(x, context, cache, cache_index, dropout_key)

    if remat != "none":
        block = jax.checkpoint(block, policy=_REMAT_POLICIES[remat])
    return block(params, x)


def _frequencies(config: ModelConfig, *, windowed: bool = False) -> npt.NDArray[np.float32]:
    """Return the rotary frequencies of one kind of layer."""
    if windowed and config.window_rope_theta is not None:
        return frequencies(config.head_width, config.window_rope_theta)
    return frequencies(config.head_width, config.rope_theta, config.rope_scaling)


def segment_mask(segments: jax.Array) -> jax.Array:
    """Return the mask of causal attention within each example of a packed row.

    Args:
        segments: [B, T] int32, 0 for padding, else the number of the example in its row.

    Returns:
        [B, 1, T, T] bool. Padding attends to padding, so that no softmax is empty.
    """
    length = segments.shape[1]
    same = segments[:, :, None] == segments[:, None, :]
    causal = jnp.tril(jnp.ones((length, length), dtype=bool))
    return (same & causal)[:, None]


def build(config: ModelConfig, vocab_size: int, seed: int) -> tuple[Graph, Params]:
    """Return a newly initialized model: its static graph and its parameters."""
    params: Params = jax.tree.map(jnp.asarray, init(config, vocab_size, seed))
    return shape(config, vocab_size)[0], params


def init(config: ModelConfig, vocab_size: int, seed: int) -> Params:
    """Return initial parameters, float32, as NumPy arrays: the same bits for every device.

    Scales of norms are 1 and biases 0. All else is normal, truncated at two standard deviations,
    with variance 1 / inputs (LeCun et al. 1998).
    """
    target = shape(config, vocab_size)[1]
    leaves, structure = jax.tree_util.tree_flatten_with_path(target)
    values = []
    for index, (path, leaf) in enumerate(leaves):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "/scale" in name:
            values.append(np.full(leaf.shape, 1.0 - config.norm_offset, np.float32))
        elif "/bias" in name:
            values.append(np.zeros(leaf.shape, np.float32))
        else:
            inputs = config.width if name.startswith("embedding/") else leaf.shape[0]
            values.append(normal(leaf.shape, inputs, seed, index))
    params: Params = jax.tree_util.tree_unflatten(structure, values)
    return params


def normal(shape: tuple[int, ...], inputs: int, seed: int, index: int) -> npt.NDArray[np.float32]:
    """Return normal samples of variance 1 / inputs, truncated at two standard deviations.

    They are drawn on the CPU, in blocks of one size: one small program is compiled, and not one
    for each shape.

    Args:
        shape: of the array.
        inputs: features of the input of the layer.
        seed: of the model.
        index: of the array in the model, so that no two are equal.
    """
    size = math.prod(shape)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        blocks = [
            np.asarray(_sample(np.uint32(seed), index, block))
            for block in range(-(-size // _SAMPLE_SIZE))
        ]
    samples: npt.NDArray[np.float32] = np.concatenate(blocks)[:size] * np.float32(inputs**-0.5)
    return samples.reshape(shape)


@jax.jit
def _sample(seed: np.uint32, leaf: int, block: int) -> jax.Array:
    """Return one block of an array's samples, of variance 1."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), leaf), block)
    return jax.random.truncated_normal(key, -2.0, 2.0, (_SAMPLE_SIZE,)) / _TRUNCATED_STDDEV


def shape(
    config: ModelConfig,
    vocab_size: int,
    *,
    fused: bool = False,
    scanned: bool = False,
    lora: LoraConfig | None = None,
) -> tuple[Graph, Params]:
    """Return the static graph, and shapes and dtypes in place of parameters; compute nothing."""
    graph, params = _shape(config, vocab_size, fused, scanned, lora)
    copy: Params = jax.tree.map(lambda leaf: leaf, params)  # since a State is mutable
    return graph, copy


@lru_cache(maxsize=16)
def _shape(
    config: ModelConfig, vocab_size: int, fused: bool, scanned: bool, lora: LoraConfig | None
) -> tuple[Graph, Params]:
    def create() -> Decoder:
        rngs = nnx.Rngs(params=0)
        return Decoder(config, vocab_size, rngs=rngs, fused=fused, scanned=scanned, lora=lora)

    model = nnx.eval_shape(create)
    graph, params = nnx.split(model, nnx.Param)
    if scanned:
        for path, variable in nnx.to_flat_state(params):
            if path[0] == "blocks":
                leaf = variable.get_value()
                stacked = (config.layers, *leaf.shape)
                variable.set_value(jax.ShapeDtypeStruct(stacked, leaf.dtype))
    return graph, params


def fuse(params: Params, config: ModelConfig) -> Params:
    """Return the parameters of the fused form.

    Projections that read the same input are concatenated, and each norm's scale is multiplied into
    the projections that follow it: fewer and larger matmuls, and no sum over tokens for the
    gradient of a scale. Training fuses once per update and differentiates through this function.

    Args:
        params: of the plain form.
        config: of the model.
    """
    plain: Any = nnx.to_pure_dict(params)

    def fused_with(norm: Any, *projections: Any) -> dict[str, jax.Array]:
        kernel = jnp.concatenate([p["kernel"] for p in projections], axis=1)
        result = {"kernel": (norm["scale"] + config.norm_offset)[:, None] * kernel}
        if "bias" in projections[0]:
            result["bias"] = jnp.concatenate([p["bias"] for p in projections])
        return result

    table = plain["embedding"]["embedding"]
    unembedding = {"kernel": table.T} if config.tie_embeddings else plain["unembedding"]
    fused = {
        "embedding": plain["embedding"],
        "unembedding": fused_with(plain["final_norm"], unembedding),
        "blocks": {},
    }
    for index, block in plain["blocks"].items():
        attention, mlp = block["attention"], block["mlp"]
        qkv = attention["queries"], attention["keys"], attention["values"]
        result = {
            "attention": {
                "inputs": fused_with(block["attention_norm"], *qkv),
                "output": attention["output"],
            },
            "mlp": {
                "inputs": fused_with(block["mlp_norm"], mlp["gate"], mlp["up"]),
                "down": mlp["down"],
            },
        }
        result["attention"] |= {
            name: attention[name] for name in ("query_norm", "key_norm") if name in attention
        }
        result |= {
            name: block[name] for name in ("attention_post_norm", "mlp_post_norm") if name in block
        }
        fused["blocks"][index] = result
    target = shape(config, table.shape[0], fused=True)[1]
    nnx.replace_by_pure_dict(target, fused)
    return target


def stack(params: Params, *, consume: bool = False) -> Params:
    """Return the parameters of the scanned form.

    The arrays of all blocks become one array with a leading axis for the layer. One block is
    compiled for all, and rematerialization saves memory on a CPU too, where XLA undoes
    `jax.checkpoint` outside a loop.

    Args:
        params: of the plain or the fused form, or adapters alone.
        consume: whether to delete each array once it is stacked, so that memory holds no two
            copies.
    """
    result: dict[tuple[Any, ...], Any] = {}
    by_layer: dict[tuple[Any, ...], dict[Any, Any]] = {}
    for path, variable in nnx.to_flat_state(params):
        if path[0] == "blocks":
            by_layer.setdefault(("blocks", *path[2:]), {})[path[1]] = variable
        else:
            result[path] = variable
    for path, variables in by_layer.items():
        ordered = [variables[index] for index in sorted(variables)]
        result[path] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ordered)
        if consume:
            _delete(ordered, result[path])
    return nnx.from_flat_state(result)


def unstack(params: Params, *, consume: bool = False) -> Params:
    """Invert :func:`stack`."""
    result: dict[tuple[Any, ...], Any] = {}
    for path, variable in nnx.to_flat_state(params):
        if path[0] != "blocks":
            result[path] = variable
            continue
        layers = []
        for index, leaf in enumerate(variable[...]):
            layers.append(jax.tree.map(lambda _, leaf=leaf: leaf, variable))
            result["blocks", index, *path[1:]] = layers[-1]
        if consume:
            _delete(variable, layers)
    return nnx.from_flat_state(result)


def _delete(consumed: Any, result: Any) -> None:
    """Free arrays once those computed from them are ready."""
    jax.block_until_ready(result)
    for leaf in jax.tree.leaves(consumed):
        leaf.delete()


def empty_cache(config: ModelConfig, batch: int, length: int, dtype: jnp.dtype) -> list[LayerCache]:
    """Return a cache for `batch` sequences of at most `length` tokens."""
    shape = (batch, length, config.kv_heads, config.head_width)
    return [
        LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.layers)
    ]


def as_type(params: Params, dtype: str) -> Params:
    """Return the parameters cast to a dtype."""
    cast: Params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    return cast


def parameter_count(params: Params) -> int:
    """Return the number of scalars."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(params))
