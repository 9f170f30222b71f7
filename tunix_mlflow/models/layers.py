"""What decoders are made of: rotary positions, attention, feed-forward, norms, adapters.

Shapes in comments: B batch, T query length, S key length, H query heads, K key/value heads,
D head width, W model width.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx

from tunix_mlflow.config.schema import LoraConfig, ModelConfig, RopeScaling

_MASKED_SCORE = -1e30  # a score whose share is 0
_MIN_BLOCK = 128  # of a row's queries, in attention


class LayerCache(NamedTuple):
    """Keys and values of the tokens seen so far, for one layer."""

    key: jax.Array  # [B, S, K, D]
    value: jax.Array  # [B, S, K, D]


def frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> npt.NDArray[np.float32]:
    """Radians a position, of each pair of a head: [head_dim / 2].

    Args:
        head_dim: even.
        theta: their base.
        scaling: stretches positions for a longer context: all alike (Chen et al. 2023), or as
            Llama 3.1 does, long waves fully, short ones not, those between in part.
    """
    pairs = head_dim // 2
    found = theta ** (-np.arange(pairs, dtype=np.float64) / pairs)
    if scaling is None:
        return found.astype(np.float32)
    stretched = found / scaling.factor
    if scaling.kind == "linear":
        return stretched.astype(np.float32)
    rope_sin_cos = scaling.original_positions * found / (2 * math.pi)  # within the first context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((rope_sin_cos - low) / (high - low), 0.0, 1.0)
    return (kept * found + (1 - kept) * stretched).astype(np.float32)


class AttentionContext(NamedTuple):
    """What the layers of one kind see: where they may look, and how positions turn heads."""

    mask: jax.Array  # [B, 1, T, S] bool, true where a query may look
    sin: jax.Array  # [B, T, 1, D / 2] float32
    cos: jax.Array  # the same


def rope_sin_cos(
    positions: jax.Array, frequency: npt.NDArray[np.float32] | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sine and cosine of each pair's angle, [B, T, 1, D / 2] each, float32.

    Args:
        positions: [B, T], int32.
        frequency: [D / 2], of :func:`frequencies`.
    """
    angle = positions[..., None].astype(jnp.float32) * frequency  # [B, T, D / 2]
    both = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)

    def kept(both: jax.Array) -> jax.Array:
        return both @ jnp.eye(both.shape[-1])

    # XLA on a CPU computes sines again in every layer, for every head, forth and back, and no
    # barrier keeps it from that: but a product it computes once. This one changes no bit.
    both = jax.lax.platform_dependent(both, cpu=kept, default=lambda same: same)
    sin, cos = jnp.split(both[:, :, None], 2, axis=-1)
    return sin, cos


def rotate(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
    """Rotary embedding, the two halves of a head being the pairs.

    Args:
        x: [B, T, heads, D], D even.
        sin: of :func:`turns`.
        cos: of :func:`turns`.

    Returns:
        [B, T, heads, D], in the dtype of `x`.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """Bend values smoothly into -cap..cap (Gemma 2, 2024); None leaves them."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    scale: float | None = None,
    cap: float | None = None,
    *,
    causal: bool = False,
) -> jax.Array:
    """Attention of a CPU: the query heads of one key head are the rows of one product.

    Args:
        q: [B, T, H, D].
        k: [B, S, K, D], H a multiple of K.
        v: [B, S, K, D].
        mask: [B, 1, T, S], true where a query may look.
        scale: of the scores; None: D ** -0.5.
        cap: of the scores; see :func:`softcap`.
        causal: T is S, and no query may look at a later key: what comes after the last query of
            a piece is not computed for it. With a cap all is.

    Returns:
        [B, T, H, D], without a cap as `jax.nn.dot_product_attention` up to rounding.
    """
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    scale = width**-0.5 if scale is None else scale
    rows = (q * scale).reshape(batch, length, groups, -1, width).transpose(0, 2, 3, 1, 4)
    keys, values = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B, K, S, D]
    blocks = _block_count(length) if causal else 1
    if cap is None:
        found = _blockwise_attention(rows, keys, values, mask, blocks)
    else:
        scores = softcap(_scores(rows, keys), cap)
        found = _weighted_values(_probabilities(scores, mask), values)
    return found.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)


# Of attention: rows [B, K, H / K, T, D] are queries, keys and values [B, K, S, D], scores and
# shares [B, K, H / K, T, S]. The rows of one key head are computed as one.


def _scores(rows: jax.Array, keys: jax.Array) -> jax.Array:
    flat = rows.reshape(*rows.shape[:2], -1, rows.shape[-1])
    return (flat @ keys.swapaxes(-1, -2)).astype(jnp.float32).reshape(*rows.shape[:4], -1)


def _probabilities(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax over what may be seen."""
    return jax.nn.softmax(jnp.where(mask[:, :, None], scores, _MASKED_SCORE), axis=-1)


def _weighted_values(probabilities: jax.Array, values: jax.Array) -> jax.Array:
    """[B, K, H / K, T, D]."""
    flat = probabilities.reshape(*probabilities.shape[:2], -1, probabilities.shape[-1]).astype(
        values.dtype
    )
    return (flat @ values).reshape(*probabilities.shape[:4], -1)


def _weighted_rows(probabilities: jax.Array, rows: jax.Array) -> jax.Array:
    """For each key the sum of rows by their shares of it: [B, K, S, D]."""
    flat, wide = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (probabilities, rows))
    return (wide.swapaxes(-1, -2) @ flat).swapaxes(-1, -2)


def _block_count(length: int) -> int:
    """Into how many pieces queries are cut; each costs a compiler's time."""
    fitting = (n for n in (4, 2) if length % n == 0 and length // n >= _MIN_BLOCK)
    return next(fitting, 1)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blockwise_attention(
    rows: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array, blocks: int
) -> jax.Array:
    """[B, K, H / K, T, D]. For the way back the shares alone are kept; XLA would keep three
    arrays of that size."""
    return _blockwise_attention_forward(rows, keys, values, mask, blocks)[0]


_Kept = tuple[jax.Array, jax.Array, jax.Array, list[jax.Array]]


def _blockwise_attention_forward(
    rows: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array, blocks: int
) -> tuple[jax.Array, _Kept]:
    found, kept = [], []
    for own, seen in _blocks(rows.shape[3], keys.shape[2], blocks):
        scores = _scores(rows[:, :, :, own], keys[:, :, seen])
        kept.append(_probabilities(scores, mask[:, :, own, seen]).astype(values.dtype))
        found.append(_weighted_values(kept[-1], values[:, :, seen]))
    return jnp.concatenate(found, axis=3), (rows, keys, values, kept)


def _blockwise_attention_backward(
    blocks: int, saved: _Kept, gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    rows, keys, values, kept = saved
    d_rows = []
    d_keys, d_values = (jnp.zeros(x.shape, jnp.float32) for x in (keys, values))
    cuts = _blocks(rows.shape[3], keys.shape[2], blocks)
    for (own, seen), probabilities in zip(cuts, kept, strict=True):
        wide, back = probabilities.astype(jnp.float32), gradient[:, :, :, own]
        d_probabilities = _scores(back, values[:, :, seen])
        d_scores = wide * (
            d_probabilities - jnp.sum(d_probabilities * wide, axis=-1, keepdims=True)
        )
        d_scores = d_scores.astype(rows.dtype)
        d_rows.append(_weighted_values(d_scores, keys[:, :, seen]))
        unseen = ((0, 0), (0, 0), (0, keys.shape[2] - probabilities.shape[-1]), (0, 0))
        d_keys += jnp.pad(_weighted_rows(d_scores, rows[:, :, :, own]), unseen)
        d_values += jnp.pad(_weighted_rows(probabilities, back), unseen)
    back = jnp.concatenate(d_rows, axis=3)
    return back, d_keys.astype(keys.dtype), d_values.astype(values.dtype), None


def _blocks(length: int, keys: int, blocks: int) -> list[tuple[slice, slice]]:
    """Of each piece: its queries, and the keys that they may see."""
    if blocks == 1:
        return [(slice(0, length), slice(0, keys))]
    size = length // blocks
    return [(slice(at, at + size), slice(0, at + size)) for at in range(0, length, size)]


_blockwise_attention.defvjp(_blockwise_attention_forward, _blockwise_attention_backward)


@jax.custom_vjp
def _linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel


def _linear_backward(
    saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    rows, columns = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    return gradient @ kernel.T, rows.T @ columns


_linear.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _linear_backward)


class Linear(nnx.Linear):
    """nnx.Linear whose kernel's gradient is one product of two matrices; with an adapter or not.

    Left to itself JAX makes that gradient turned round and XLA copies it on a CPU, which costs a
    step of ours a tenth of its time. An adapter adds `alpha / rank * (x A) B` (Hu et al. 2021).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rngs: nnx.Rngs,
        *,
        bias: bool = False,
        lora: LoraConfig | None = None,
    ) -> None:
        # Zeros: the numbers come from `decoder.init` or a file, and to trace drawing takes time.
        zeros = nnx.initializers.zeros_init()
        super().__init__(inputs, outputs, use_bias=bias, kernel_init=zeros, rngs=rngs)
        self.lora = lora
        if lora is not None:
            self.lora_a = nnx.LoRAParam(jnp.zeros((inputs, lora.rank)))
            self.lora_b = nnx.LoRAParam(jnp.zeros((lora.rank, outputs)))

    def __call__(self, inputs: jax.Array, dropout_key: Any = None) -> jax.Array:
        """[..., inputs] -> [..., outputs].

        Args:
            inputs: as said.
            noise: a key, to leave out inputs of the adapter at random; None: none is left out.
        """
        made = _linear(inputs, self.kernel[...])
        if self.bias is not None:
            made = made + self.bias[...]
        if self.lora is None:
            return made
        if dropout_key is not None and self.lora.dropout:
            keep = 1 - self.lora.dropout
            kept = jax.random.bernoulli(dropout_key, keep, inputs.shape)
            inputs = jnp.where(kept, inputs / keep, 0)
        added = _linear(_linear(inputs, self.lora_a[...]), self.lora_b[...])
        return made + added * (self.lora.alpha / self.lora.rank)


class Norm(nnx.Module):
    """RMSNorm (Zhang and Sennrich 2019), in float32.

    Args:
        width: of what is normalised.
        config: read for `norm_epsilon` and `norm_offset`, which is added to the scale.
        scaled: false: without a scale.
    """

    def __init__(self, width: int, config: ModelConfig, *, scaled: bool = True) -> None:
        self.epsilon, self.offset = config.norm_epsilon, config.norm_offset
        self.scale = nnx.Param(jnp.full((width,), 1.0 - self.offset)) if scaled else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., width] -> [..., width]."""
        wide = x.astype(jnp.float32)
        made = wide * jax.lax.rsqrt(
            jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon
        )
        if self.scale is not None:
            scale = self.scale[...].astype(jnp.float32)
            made = made * (scale + self.offset if self.offset else scale)
        return made.astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention over a packed row, or over a cache.

    Args:
        config: the shape.
        rngs: makes the parameters.
        fused: queries, keys and values are one product.
        lora: adapters of some of the products.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        fused: bool = False,
        lora: LoraConfig | None = None,
    ) -> None:
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head_dim = config.head_width
        self.scale = None if config.query_scale is None else config.query_scale**-0.5
        self.cap = config.attention_softcap
        self.fused = fused
        bias = config.qkv_bias
        if fused:
            all_heads = self.heads + 2 * self.kv_heads
            self.inputs = Linear(config.width, all_heads * self.head_dim, rngs, bias=bias)
        else:

            def product(target: str, heads: int) -> Linear:
                adapter = _adapter_of(target, lora)
                return Linear(config.width, heads * self.head_dim, rngs, bias=bias, lora=adapter)

            self.queries = product("q_proj", self.heads)
            self.keys = product("k_proj", self.kv_heads)
            self.values = product("v_proj", self.kv_heads)
        self.output = Linear(
            self.heads * self.head_dim, config.width, rngs, lora=_adapter_of("o_proj", lora)
        )
        self.query_norm = Norm(self.head_dim, config) if config.qk_norm else None
        self.key_norm = Norm(self.head_dim, config) if config.qk_norm else None

    def __call__(
        self,
        x: jax.Array,  # [B, T, W]
        context: AttentionContext,
        cache: LayerCache | None,
        cache_index: jax.Array | int,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attend; with a cache, to what it holds too. Returns [B, T, W] and the cache."""
        batch, length, _ = x.shape
        if self.fused:
            heads = self.inputs(x).reshape(batch, length, -1, self.head_dim)
            q, k, v = jnp.split(heads, (self.heads, self.heads + self.kv_heads), axis=2)
        else:
            q = self.queries(x, fold_in(dropout_key, 0)).reshape(
                batch, length, self.heads, self.head_dim
            )
            k = self.keys(x, fold_in(dropout_key, 1)).reshape(
                batch, length, self.kv_heads, self.head_dim
            )
            v = self.values(x, fold_in(dropout_key, 2)).reshape(batch, length, -1, self.head_dim)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        mask, sin, cos = context
        q, k = rotate(q, sin, cos), rotate(k, sin, cos)
        if cache is not None:
            start = (0, cache_index, 0, 0)
            cache = LayerCache(
                jax.lax.dynamic_update_slice(cache.key, k, start),
                jax.lax.dynamic_update_slice(cache.value, v, start),
            )
            k, v = cache

        def on_cpu(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
            return attend(q, k, v, mask, self.scale, self.cap, causal=cache is None)

        def elsewhere(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
            return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=self.scale)

        if self.cap is None:
            attended = jax.lax.platform_dependent(q, k, v, mask, cpu=on_cpu, default=elsewhere)
        else:
            attended = on_cpu(q, k, v, mask)  # the library's has no cap
        return self.output(attended.reshape(batch, length, -1), fold_in(dropout_key, 3)), cache


class FeedForward(nnx.Module):
    """Two products gate each other (Shazeer 2020), and one leads back."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        fused: bool = False,
        lora: LoraConfig | None = None,
    ) -> None:
        self.fused = fused
        self.activation = config.activation
        width, hidden = config.width, config.mlp_width
        if fused:
            self.inputs = Linear(width, 2 * hidden, rngs)
        else:
            self.gate = Linear(width, hidden, rngs, lora=_adapter_of("gate_proj", lora))
            self.up = Linear(width, hidden, rngs, lora=_adapter_of("up_proj", lora))
        self.down = Linear(hidden, width, rngs, lora=_adapter_of("down_proj", lora))

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """[B, T, W] -> [B, T, W]."""
        if self.fused:
            gate, up = jnp.split(self.inputs(x), 2, -1)
        else:
            gate, up = self.gate(x, fold_in(dropout_key, 4)), self.up(x, fold_in(dropout_key, 5))
        active = jax.nn.silu(gate) if self.activation == "silu" else jax.nn.gelu(gate)
        return self.down(active * up, fold_in(dropout_key, 6))


class Block(nnx.Module):
    """Attention, then feed-forward, each normalised first and added to the stream.

    Gemma normalises once more what is added.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        fused: bool = False,
        lora: LoraConfig | None = None,
    ) -> None:
        self.attention_norm = Norm(config.width, config, scaled=not fused)
        self.attention = Attention(config, rngs=rngs, fused=fused, lora=lora)
        self.attention_post_norm = Norm(config.width, config) if config.post_norms else None
        self.mlp_norm = Norm(config.width, config, scaled=not fused)
        self.mlp = FeedForward(config, rngs=rngs, fused=fused, lora=lora)
        self.mlp_post_norm = Norm(config.width, config) if config.post_norms else None

    def __call__(
        self,
        x: jax.Array,
        context: AttentionContext,
        cache: LayerCache | None,
        cache_index: jax.Array | int,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """[B, T, W] -> [B, T, W], and the cache."""
        added, cache = self.attention(
            self.attention_norm(x), context, cache, cache_index, dropout_key
        )
        x = x + (added if self.attention_post_norm is None else self.attention_post_norm(added))
        added = self.mlp(self.mlp_norm(x), dropout_key)
        return x + (added if self.mlp_post_norm is None else self.mlp_post_norm(added)), cache


def _adapter_of(target: str, lora: LoraConfig | None) -> LoraConfig | None:
    """The adapter of a product, by the name that other libraries give it."""
    return lora if lora is not None and lora.rank and target in lora.targets else None


def fold_in(dropout_key: jax.Array | None, number: jax.Array | int) -> jax.Array | None:
    """One of the keys that a key is cut into."""
    return None if dropout_key is None else jax.random.fold_in(dropout_key, number)
