"""A decoder-only transformer in Flax NNX.

RMSNorm before each part (Zhang and Sennrich 2019), rotary positions (Su et al. 2021),
grouped-query attention (Ainslie et al. 2023), SwiGLU (Shazeer 2020), embeddings tied or
not. Shapes in comments: B batch, T query length, S key length, H query heads, K key/value
heads, D head width, W model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tunix_mlflow.config import ModelConfig

Graph: TypeAlias = "nnx.GraphDef[Decoder]"
"""The static part of a decoder: structure, no arrays."""
Params: TypeAlias = "nnx.State[Any, Any]"
"""Its arrays."""


_PIECE = 1 << 16
_CUT_DEVIATION = 0.87962566103423978  # of a standard normal that is cut off at 2
_NEVER = -1e30  # a score whose share is 0


class LayerCache(NamedTuple):
    """Keys and values of the tokens seen so far, for one layer."""

    key: jax.Array  # [B, S, K, D]
    value: jax.Array  # [B, S, K, D]


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary embedding, the two halves of a head being the pairs.

    Args:
        x: [B, T, heads, D], D even.
        positions: [B, T], int32.
        theta: base of the frequencies.

    Returns:
        [B, T, heads, D], in the dtype of `x`.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency  # [B, T, 1, D/2]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Attention of a CPU: the query heads of one key head are the rows of one product.

    Args:
        q: [B, T, H, D].
        k: [B, S, K, D], H a multiple of K.
        v: [B, S, K, D].
        mask: [B, 1, T, S], true where a query may look.

    Returns:
        [B, T, H, D], as `jax.nn.dot_product_attention` up to rounding.
    """
    batch, length, heads, width = q.shape
    seen, groups = k.shape[1:3]
    each = heads // groups
    rows = (q * width**-0.5).reshape(batch, length, groups, each, width)
    rows = rows.transpose(0, 2, 3, 1, 4).reshape(batch, groups, each * length, width)
    scores = (rows @ k.transpose(0, 2, 3, 1)).astype(jnp.float32)
    scores = scores.reshape(batch, groups, each, length, seen)
    shares = jax.nn.softmax(jnp.where(mask[:, :, None], scores, _NEVER), axis=-1)
    shares = shares.astype(v.dtype).reshape(batch, groups, each * length, seen)
    found = (shares @ v.transpose(0, 2, 1, 3)).reshape(batch, groups, each, length, width)
    return found.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)


def _library_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel


def _product_backward(
    saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    rows, columns = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    return gradient @ kernel.T, rows.T @ columns


_product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _product_backward)


class Product(nnx.Linear):
    """nnx.Linear without a bias, whose kernel's gradient is one product of two matrices.

    Left to itself JAX makes that gradient turned round and XLA copies it on a CPU, which costs a
    step of ours a tenth of its time.
    """

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs) -> None:
        super().__init__(inputs, outputs, use_bias=False, rngs=rngs)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """[..., inputs] -> [..., outputs]."""
        return _product(inputs, self.kernel[...])


class Attention(nnx.Module):
    """Grouped-query attention over a packed row, or over a cache."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, fused: bool = False) -> None:
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head_dim = config.head_dim or config.width // config.heads
        self.theta = config.rope_theta
        self.fused = fused
        if fused:
            all_heads = self.heads + 2 * self.kv_heads
            self.inputs = Product(config.width, all_heads * self.head_dim, rngs)
        else:
            self.queries = Product(config.width, self.heads * self.head_dim, rngs)
            self.keys = Product(config.width, self.kv_heads * self.head_dim, rngs)
            self.values = Product(config.width, self.kv_heads * self.head_dim, rngs)
        self.output = Product(self.heads * self.head_dim, config.width, rngs)

    def __call__(
        self,
        x: jax.Array,  # [B, T, W]
        positions: jax.Array,  # [B, T]
        mask: jax.Array,  # [B, 1, T, S]
        cache: LayerCache | None,
        cache_index: jax.Array | int,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attend; with a cache, to what it holds too. Returns [B, T, W] and the cache."""
        batch, length, _ = x.shape
        if self.fused:
            heads = self.inputs(x).reshape(batch, length, -1, self.head_dim)
            q, k, v = jnp.split(heads, (self.heads, self.heads + self.kv_heads), axis=2)
        else:
            q = self.queries(x).reshape(batch, length, self.heads, self.head_dim)
            k = self.keys(x).reshape(batch, length, self.kv_heads, self.head_dim)
            v = self.values(x).reshape(batch, length, self.kv_heads, self.head_dim)
        q, k = rotate(q, positions, self.theta), rotate(k, positions, self.theta)
        if cache is not None:
            start = (0, cache_index, 0, 0)
            cache = LayerCache(
                jax.lax.dynamic_update_slice(cache.key, k, start),
                jax.lax.dynamic_update_slice(cache.value, v, start),
            )
            k, v = cache
        attended = jax.lax.platform_dependent(q, k, v, mask, cpu=attend, default=_library_attention)
        return self.output(attended.reshape(batch, length, -1)), cache


class FeedForward(nnx.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, fused: bool = False) -> None:
        self.fused = fused
        if fused:
            self.inputs = Product(config.width, 2 * config.mlp_width, rngs)
        else:
            self.gate = Product(config.width, config.mlp_width, rngs)
            self.up = Product(config.width, config.mlp_width, rngs)
        self.down = Product(config.mlp_width, config.width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, W] -> [B, T, W]."""
        gate, up = jnp.split(self.inputs(x), 2, -1) if self.fused else (self.gate(x), self.up(x))
        return self.down(jax.nn.silu(gate) * up)


class Block(nnx.Module):
    """Attention, then feed-forward, each normalised first and added to the stream."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, fused: bool = False) -> None:
        self.attention_norm = _norm(config, rngs, fused)
        self.attention = Attention(config, rngs=rngs, fused=fused)
        self.mlp_norm = _norm(config, rngs, fused)
        self.mlp = FeedForward(config, rngs=rngs, fused=fused)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        cache: LayerCache | None,
        cache_index: jax.Array | int,
    ) -> tuple[jax.Array, LayerCache | None]:
        """[B, T, W] -> [B, T, W], and the cache."""
        attended, cache = self.attention(
            self.attention_norm(x), positions, mask, cache, cache_index
        )
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), cache


class Decoder(nnx.Module):
    """Token ids to next-token logits.

    Args:
        config: the shape.
        vocab_size: number of tokens.
        rngs: makes the parameters.
        fused: a form that computes the same in fewer and larger products; see :func:`fuse`.
    """

    def __init__(
        self, config: ModelConfig, vocab_size: int, *, rngs: nnx.Rngs, fused: bool = False
    ) -> None:
        self.config = config
        self.embedding = nnx.Embed(vocab_size, config.width, rngs=rngs)
        self.blocks = nnx.List(
            [Block(config, rngs=rngs, fused=fused) for _ in range(config.layers)]
        )
        self.final_norm = _norm(config, rngs, fused)
        tied = config.tie_embeddings and not fused
        self.unembedding = None if tied else Product(config.width, vocab_size, rngs)

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
    ) -> tuple[jax.Array, list[LayerCache]]:
        """Run the stack.

        Args:
            tokens: [B, T] int32.
            positions: [B, T] int32, from 0 within each example.
            mask: [B, 1, T, S] bool, true where a query may look.
            cache: one LayerCache a layer, written at `cache_index`; None without a cache.
            cache_index: scalar int32: the slot of the first of `tokens`.
            remat: what of a block the backward pass computes again: `none`, `block` (all of
                it), `dots` (all but the products with parameters).

        Returns:
            [B, T, W], normalised, and the updated cache, empty without one.
        """
        x = self.embedding(tokens)
        caches: list[LayerCache] = []
        for number, block in enumerate(self.blocks):
            layer = None if cache is None else cache[number]
            x, layer = _REMAT[remat](block, x, positions, mask, layer, cache_index)
            if layer is not None:
                caches.append(layer)
        return self.final_norm(x), caches

    def logits(self, features: jax.Array) -> jax.Array:
        """[..., W] -> [..., vocab]."""
        if self.unembedding is None:
            return self.embedding.attend(features)
        return self.unembedding(features)


_REMAT: dict[str, Callable[..., tuple[jax.Array, LayerCache | None]]] = {
    "none": Block.__call__,
    "block": nnx.remat(Block.__call__),
    "dots": nnx.remat(
        Block.__call__, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
}


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

    Norms scale by 1. All else is normal, cut off at two standard deviations, with a variance of
    1 / inputs (LeCun et al. 1998). Drawn on the CPU in pieces of one size, so that one small
    program is compiled and not one for each shape.
    """
    target = shape(config, vocab_size)[1]
    leaves, structure = jax.tree_util.tree_flatten_with_path(target)
    key = jax.random.key_data(jax.random.key(seed))
    made = []
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        for number, (path, leaf) in enumerate(leaves):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if "/scale" in name:
                made.append(np.ones(leaf.shape, np.float32))
                continue
            pieces = range(-(-leaf.size // _PIECE))
            drawn = np.concatenate([np.asarray(_draw(key, number, piece)) for piece in pieces])
            inputs = config.width if name.startswith("embedding/") else leaf.shape[0]
            made.append((drawn[: leaf.size] * np.float32(inputs**-0.5)).reshape(leaf.shape))
    params: Params = jax.tree_util.tree_unflatten(structure, made)
    return params


def shape(config: ModelConfig, vocab_size: int, *, fused: bool = False) -> tuple[Graph, Params]:
    """The static graph, and shapes and types in place of parameters; nothing is computed."""
    model = nnx.eval_shape(
        lambda: Decoder(config, vocab_size, rngs=nnx.Rngs(params=0), fused=fused)
    )
    graph, params = nnx.split(model, nnx.Param)
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
        return {"kernel": norm["scale"][:, None] * kernel}

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
        fused["blocks"][number] = {
            "attention": {
                "inputs": after(block["attention_norm"], *inputs),
                "output": heads["output"],
            },
            "mlp": {
                "inputs": after(block["mlp_norm"], mlp["gate"], mlp["up"]),
                "down": mlp["down"],
            },
        }
    target = shape(config, table.shape[0], fused=True)[1]
    nnx.replace_by_pure_dict(target, fused)
    return target


@jax.jit
def _draw(key: jax.Array, leaf: int, piece: int) -> jax.Array:
    """One piece of a leaf's numbers, of variance 1."""
    stream = jax.random.wrap_key_data(key)
    stream = jax.random.fold_in(jax.random.fold_in(stream, leaf), piece)
    return jax.random.truncated_normal(stream, -2.0, 2.0, (_PIECE,)) / _CUT_DEVIATION


def empty_cache(config: ModelConfig, batch: int, length: int, dtype: jnp.dtype) -> list[LayerCache]:
    """A cache of zeros for `batch` sequences of at most `length` tokens."""
    head_dim = config.head_dim or config.width // config.heads
    shape = (batch, length, config.kv_heads, head_dim)
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


def _norm(config: ModelConfig, rngs: nnx.Rngs, fused: bool) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.width, epsilon=config.norm_epsilon, use_scale=not fused, rngs=rngs)
