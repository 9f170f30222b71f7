"""The layers of a decoder: linear layers with adapters, norms, attention, feed-forward, blocks.

Shapes in comments: B batch, T query length, S key length, K key/value heads, D head width,
W model width.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tunix_mlflow.config.schema import LoraConfig, ModelConfig
from tunix_mlflow.models import cpu_kernels
from tunix_mlflow.models.attention import softcapped_attention
from tunix_mlflow.models.rotary import rotate


class LayerCache(NamedTuple):
    """Keys and values of the tokens so far, for one layer."""

    key: jax.Array  # [B, S, K, D]
    value: jax.Array  # [B, S, K, D]


class AttentionContext(NamedTuple):
    """What layers of one kind share: which keys a query may attend to, and rotary angles."""

    mask: jax.Array  # [B, 1, T, S] bool, true where a query may attend
    sin: jax.Array  # [B, T, 1, D / 2] float32
    cos: jax.Array  # the same


def fold_in(dropout_key: jax.Array | None, data: jax.Array | int) -> jax.Array | None:
    """Return `jax.random.fold_in` of the key, or None without one."""
    return None if dropout_key is None else jax.random.fold_in(dropout_key, data)


class Linear(nnx.Linear):
    """nnx.Linear with the gradient of :func:`cpu_kernels.linear` and an optional LoRA adapter.

    An adapter adds `alpha / rank * (x A) B` (Hu et al. 2021).

    Args:
        inputs: features of the input.
        outputs: features of the output.
        rngs: unused, since parameters begin at zero; nnx.Linear asks for it.
        bias: whether to add one.
        lora: of the adapter; None: no adapter.
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
        # Zeros, since `decoder.init` or a file sets the values: random ones take time to trace.
        zeros = nnx.initializers.zeros_init()
        super().__init__(inputs, outputs, use_bias=bias, kernel_init=zeros, rngs=rngs)
        self.lora = lora
        if lora is not None:
            self.lora_a = nnx.LoRAParam(jnp.zeros((inputs, lora.rank)))
            self.lora_b = nnx.LoRAParam(jnp.zeros((lora.rank, outputs)))

    def __call__(self, inputs: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """[..., inputs] -> [..., outputs].

        Args:
            inputs: of the layer.
            dropout_key: for dropout of the adapter's inputs; None: no dropout.
        """
        result = cpu_kernels.linear(inputs, self.kernel[...])
        if self.bias is not None:
            result = result + self.bias[...]
        if self.lora is None:
            return result
        if dropout_key is not None and self.lora.dropout:
            keep = 1 - self.lora.dropout
            kept = jax.random.bernoulli(dropout_key, keep, inputs.shape)
            inputs = jnp.where(kept, inputs / keep, 0)
        down = cpu_kernels.linear(inputs, self.lora_a[...])
        update = cpu_kernels.linear(down, self.lora_b[...])
        return result + update * (self.lora.alpha / self.lora.rank)


class Norm(nnx.Module):
    """RMSNorm (Zhang and Sennrich 2019), in float32.

    Args:
        width: features of the input.
        config: `norm_epsilon`, and `norm_offset`, which is added to the scale.
        scaled: whether to multiply by a learned scale.
    """

    def __init__(self, width: int, config: ModelConfig, *, scaled: bool = True) -> None:
        self.epsilon, self.offset = config.norm_epsilon, config.norm_offset
        self.scale = nnx.Param(jnp.full((width,), 1.0 - self.offset)) if scaled else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., width] -> [..., width]."""
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        result = wide * jax.lax.rsqrt(mean_square + self.epsilon)
        if self.scale is not None:
            scale = self.scale[...].astype(jnp.float32)
            result = result * (scale + self.offset if self.offset else scale)
        return result.astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention over a packed row, or over a cache.

    Args:
        config: of the model.
        rngs: passed to the linear layers.
        fused: whether queries, keys and values are one projection.
        lora: adapters of the projections that it targets; None: no adapters.
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

            def projection(target: str, heads: int) -> Linear:
                adapter = _adapter_of(target, lora)
                return Linear(config.width, heads * self.head_dim, rngs, bias=bias, lora=adapter)

            self.queries = projection("q_proj", self.heads)
            self.keys = projection("k_proj", self.kv_heads)
            self.values = projection("v_proj", self.kv_heads)
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
        """Attend, with a cache to its tokens too; return [B, T, W] and the updated cache."""
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

        if self.cap is None:
            on_cpu = partial(
                cpu_kernels.dot_product_attention, scale=self.scale, causal=cache is None
            )
            elsewhere = partial(_dot_product_attention, scale=self.scale)
            attended = jax.lax.platform_dependent(q, k, v, mask, cpu=on_cpu, default=elsewhere)
        else:
            attended = softcapped_attention(q, k, v, mask, scale=self.scale, cap=self.cap)
        return self.output(attended.reshape(batch, length, -1), fold_in(dropout_key, 3)), cache


class FeedForward(nnx.Module):
    """Gated feed-forward layer (Shazeer 2020).

    Args:
        config: of the model.
        rngs: passed to the linear layers.
        fused: whether gate and up are one projection.
        lora: adapters of the projections that it targets; None: no adapters.
    """

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
    """Attention, then feed-forward: each normalizes its input and is added to the residual stream.

    Gemma normalizes what is added, too.
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
    """Return the adapter of a projection, by the name that PEFT gives it, or None."""
    return lora if lora is not None and lora.rank and target in lora.targets else None


def _dot_product_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, scale: float | None
) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale)
