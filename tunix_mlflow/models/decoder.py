"""A decoder-only transformer in Flax NNX, of the family that its configuration names.

Rotary positions (Su et al. 2021), grouped-query attention (Ainslie et al. 2023), embeddings tied
or not. Shapes in comments: B batch, T query length, S key length, K key/value heads, D head
width, W model width.
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


_DRAW_SIZE = 1 << 16
_CUT_DEVIATION = 0.87962566103423978  # of a standard normal that is cut off at 2


class Decoder(nnx.Module):
    """Token ids to next-token logits.

    Args:
        config: the shape.
        vocab_size: number of tokens.
        rngs: makes the parameters.
        fused: a form that computes the same in fewer and larger products; see :func:`fuse`.
        scanned: a form that computes the same in a loop over one block; see :func:`stack`. It is
            for training, and takes no cache.
        lora: adapters of some of the products; the fused form has none.
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
        """Logits [B, T, vocab] and the updated cache; arguments as of :meth:`features`."""
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
        """Run the stack.

        Args:
            tokens: [B, T] int32.
            positions: [B, T] int32, from 0 within each example.
            mask: [B, 1, T, S] bool, true where a query may look; without a cache never at a key
                behind itself.
            cache: one LayerCache a layer, written at `cache_index`; None without a cache.
            cache_index: scalar int32: the slot of the first of `tokens`.
            remat: what of a block the backward pass computes again: `none`, `block` (all of
                it), `dots` (all but the products with parameters).
            noise: a key, where adapters leave out inputs; None: they do not.

        Returns:
            [B, T, W], normalised, and the updated cache, empty without one.
        """
        x = self.embedding(tokens)
        if self.config.scale_embeddings:
            x = x * jnp.asarray(self.config.width**0.5, x.dtype)
        near = far = AttentionContext(mask, *rope_sin_cos(positions, _frequencies(self.config)))
        if self.config.windowed_layers:
            within = mask
            if self.config.window is not None:
                queries = cache_index + jnp.arange(tokens.shape[1])
                back = queries[:, None] - jnp.arange(mask.shape[-1])[None, :]
                within = mask & (back < self.config.window)
            near = AttentionContext(
                within, *rope_sin_cos(positions, _frequencies(self.config, windowed=True))
            )
        if self.scanned:
            return self.final_norm(self._scan(x, far, near, remat, dropout_key)), []
        caches: list[LayerCache] = []
        for number, block in enumerate(self.blocks):
            graph, params = nnx.split(block)
            x, layer = _run(
                params,
                x,
                near if number in self.config.windowed_layers else far,
                None if cache is None else cache[number],
                cache_index,
                fold_in(dropout_key, number),
                graph=graph,
                remat=remat,
            )
            if layer is not None:
                caches.append(layer)
        return self.final_norm(x), caches

    def _scan(
        self,
        x: jax.Array,
        far: AttentionContext,
        near: AttentionContext,
        remat: str,
        dropout_key: jax.Array | None,
    ) -> jax.Array:
        """All blocks, by a loop over their stacked parameters."""
        windowed, layers = self.config.windowed_layers, self.config.layers
        graph, params = nnx.split(self.blocks)

        def one(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            params, number, is_near = layer
            context = far
            if windowed:
                context = jax.tree.map(partial(jnp.where, is_near), near, far)
            own = fold_in(dropout_key, number)
            return _run(params, x, context, None, 0, own, graph=graph, remat=remat)[0], None

        numbers = np.arange(layers)
        of_layers = (params, jnp.asarray(numbers), jnp.asarray(np.isin(numbers, windowed)))
        return jax.lax.scan(one, x, of_layers)[0]

    def logits(self, features: jax.Array) -> jax.Array:
        """[..., W] -> [..., vocab]."""
        if self.unembedding is None:
            made = self.embedding.attend(features)
        else:
            made = self.unembedding(features)
        return softcap(made, self.config.logit_softcap)


_KEPT = {
    "block": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@partial(jax.jit, static_argnames=("graph", "remat"))
def _run(
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
    """One block. A function of its own, so that JAX traces one for all that are alike."""

    def block(params: Params, x: jax.Array) -> tuple[jax.Array, LayerCache | None]:
        return nnx.merge(graph, params)(x, context, cache, cache_index, dropout_key)

    if remat != "none":
        block = jax.checkpoint(block, policy=_KEPT[remat])
    return block(params, x)


def _frequencies(config: ModelConfig, *, windowed: bool = False) -> npt.NDArray[np.float32]:
    """The rotary frequencies of one kind of layer."""
    if windowed and config.window_rope_theta is not None:
        return frequencies(config.head_width, config.window_rope_theta)
    return frequencies(config.head_width, config.rope_theta, config.rope_scaling)


def segment_mask(segments: jax.Array) -> jax.Array:
    """Causal attention within one example of a packed row.

    Args:
        segments: [B, T] int32, 0 for padding, else the example's number in its row.

    Returns:
        [B, 1, T, T] bool. Padding sees itself, so that no softmax is empty.
    """
    length = segments.shape[1]
    same = segments[:, :, None] == segments[:, None, :]
    causal = jnp.tril(jnp.ones((length, length), dtype=bool))
    return (same & causal)[:, None]


def build(config: ModelConfig, vocab_size: int, seed: int) -> tuple[Graph, Params]:
    """A freshly initialised model, split into its static graph and its parameters."""
    params: Params = jax.tree.map(jnp.asarray, init(config, vocab_size, seed))
    return shape(config, vocab_size)[0], params


def init(config: ModelConfig, vocab_size: int, seed: int) -> Params:
    """Parameters to begin with, float32, as NumPy arrays: the same bits for every device.

    Norms scale by 1, biases are 0. All else is normal, cut off at two standard deviations, with a
    variance of 1 / inputs (LeCun et al. 1998). Drawn on the CPU in pieces of one size, so that
    one small program is compiled and not one for each shape.
    """
    target = shape(config, vocab_size)[1]
    leaves, structure = jax.tree_util.tree_flatten_with_path(target)
    made = []
    for number, (path, leaf) in enumerate(leaves):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "/scale" in name:
            made.append(np.full(leaf.shape, 1.0 - config.norm_offset, np.float32))
        elif "/bias" in name:
            made.append(np.zeros(leaf.shape, np.float32))
        else:
            inputs = config.width if name.startswith("embedding/") else leaf.shape[0]
            made.append(normal(leaf.shape, inputs, seed, number))
    params: Params = jax.tree_util.tree_unflatten(structure, made)
    return params


def normal(shape: tuple[int, ...], inputs: int, seed: int, number: int) -> npt.NDArray[np.float32]:
    """Numbers of variance 1 / inputs, none further than two standard deviations out.

    Args:
        shape: of the array.
        inputs: as said.
        seed: of the model.
        number: of the array in the model, so that no two are alike.
    """
    size = math.prod(shape)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        blocks = [
            np.asarray(_draw(np.uint32(seed), number, fold_in))
            for fold_in in range(-(-size // _DRAW_SIZE))
        ]
    drawn: npt.NDArray[np.float32] = np.concatenate(blocks)[:size] * np.float32(inputs**-0.5)
    return drawn.reshape(shape)


def shape(
    config: ModelConfig,
    vocab_size: int,
    *,
    fused: bool = False,
    scanned: bool = False,
    lora: LoraConfig | None = None,
) -> tuple[Graph, Params]:
    """The static graph, and shapes and types in place of parameters; nothing is computed."""
    graph, params = _shape(config, vocab_size, fused, scanned, lora)
    own: Params = jax.tree.map(lambda leaf: leaf, params)  # a State can be written to
    return graph, own


@lru_cache(maxsize=16)
def _shape(
    config: ModelConfig, vocab_size: int, fused: bool, scanned: bool, lora: LoraConfig | None
) -> tuple[Graph, Params]:
    words: Any = {"fused": fused, "scanned": scanned, "lora": lora}
    model = nnx.eval_shape(lambda: Decoder(config, vocab_size, rngs=nnx.Rngs(params=0), **words))
    graph, params = nnx.split(model, nnx.Param)
    if scanned:
        for path, variable in nnx.to_flat_state(params):
            if path[0] == "blocks":
                leaf = variable.get_value()
                all_of_them = (config.layers, *leaf.shape)
                variable.set_value(jax.ShapeDtypeStruct(all_of_them, leaf.dtype))
    return graph, params


def fuse(params: Params, config: ModelConfig) -> Params:
    """The parameters of the fused form of a decoder.

    Products that read the same input stand side by side, and each norm's scale is multiplied into
    the product that follows: fewer and larger products, and no sum over tokens for a scale's
    gradient. Training fuses once an update and takes gradients back through this function.

    Args:
        params: of the plain form.
        config: its shape.
    """
    plain: Any = nnx.to_pure_dict(params)

    def after(norm: Any, *products: Any) -> dict[str, jax.Array]:
        kernel = jnp.concatenate([product["kernel"] for product in products], axis=1)
        made = {"kernel": (norm["scale"] + config.norm_offset)[:, None] * kernel}
        if "bias" in products[0]:
            made["bias"] = jnp.concatenate([product["bias"] for product in products])
        return made

    table = plain["embedding"]["embedding"]
    last = {"kernel": table.T} if config.tie_embeddings else plain["unembedding"]
    fused = {
        "embedding": plain["embedding"],
        "unembedding": after(plain["final_norm"], last),
        "blocks": {},
    }
    for number, block in plain["blocks"].items():
        heads, mlp = block["attention"], block["mlp"]
        inputs = heads["queries"], heads["keys"], heads["values"]
        made = {
            "attention": {
                "inputs": after(block["attention_norm"], *inputs),
                "output": heads["output"],
            },
            "mlp": {
                "inputs": after(block["mlp_norm"], mlp["gate"], mlp["up"]),
                "down": mlp["down"],
            },
        }
        made["attention"] |= {n: heads[n] for n in ("query_norm", "key_norm") if n in heads}
        made |= {n: block[n] for n in ("attention_post_norm", "mlp_post_norm") if n in block}
        fused["blocks"][number] = made
    target = shape(config, table.shape[0], fused=True)[1]
    nnx.replace_by_pure_dict(target, fused)
    return target


def stack(params: Params, *, consume: bool = False) -> Params:
    """The parameters of the scanned form, of the plain or the fused one or of adapters alone.

    Each array of a block becomes one of all blocks, with an axis for them in front: one block is
    compiled for all, and what the backward pass computes again is computed again on a CPU too.

    Args:
        params: as said.
        consume: delete each array that is stacked, so that memory holds them once.
    """
    whole: dict[tuple[Any, ...], Any] = {}
    of_blocks: dict[tuple[Any, ...], dict[Any, Any]] = {}
    for path, variable in nnx.to_flat_state(params):
        if path[0] == "blocks":
            of_blocks.setdefault(("blocks", *path[2:]), {})[path[1]] = variable
        else:
            whole[path] = variable
    for path, parts in of_blocks.items():
        ordered = [parts[number] for number in sorted(parts)]
        whole[path] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ordered)
        if consume:
            _delete(ordered, whole[path])
    return nnx.from_flat_state(whole)


def unstack(params: Params, *, consume: bool = False) -> Params:
    """What :func:`stack` was given; `consume` as there."""
    whole: dict[tuple[Any, ...], Any] = {}
    for path, variable in nnx.to_flat_state(params):
        if path[0] != "blocks":
            whole[path] = variable
            continue
        made = []
        for number, own in enumerate(variable[...]):
            made.append(jax.tree.map(lambda _, own=own: own, variable))
            whole["blocks", number, *path[1:]] = made[-1]
        if consume:
            _delete(variable, made)
    return nnx.from_flat_state(whole)


def _delete(used: Any, made: Any) -> None:
    """Free arrays that others were made of."""
    jax.block_until_ready(made)
    for leaf in jax.tree.leaves(used):
        leaf.delete()


@jax.jit
def _draw(seed: np.uint32, leaf: int, fold_in: int) -> jax.Array:
    """One piece of a leaf's numbers, of variance 1."""
    stream = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), leaf), fold_in)
    return jax.random.truncated_normal(stream, -2.0, 2.0, (_DRAW_SIZE,)) / _CUT_DEVIATION


def empty_cache(config: ModelConfig, batch: int, length: int, dtype: jnp.dtype) -> list[LayerCache]:
    """A cache of zeros for `batch` sequences of at most `length` tokens."""
    shape = (batch, length, config.kv_heads, config.head_width)
    return [
        LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.layers)
    ]


def as_type(params: Params, dtype: str) -> Params:
    """The same parameters in another type."""
    cast: Params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    return cast


def parameter_count(params: Params) -> int:
    """Number of scalars."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(params))
