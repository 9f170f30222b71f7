"""Grouped-query attention (Ainslie et al. 2023), with softcapped scores or in parts for kernels.

Shapes in comments: B batch, T query length, S key length, H query heads, K key/value heads,
D head width. The query heads that share a key head are rows of one matmul: rows are
[B, K, H / K, T, D], keys and values [B, K, S, D], scores and probabilities [B, K, H / K, T, S].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_MASKED_SCORE = -1e30  # a score whose probability is 0


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """Squash values smoothly into (-cap, cap) (Gemma 2, 2024); None returns them unchanged."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def softcapped_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Attend with softcapped scores, which `jax.nn.dot_product_attention` does not have.

    Args:
        q: [B, T, H, D].
        k: [B, S, K, D]; H is a multiple of K.
        v: [B, S, K, D].
        mask: [B, 1, T, S], true where a query may attend.
        scale: of the scores; None: D ** -0.5.
        cap: of the scores, see :func:`softcap`.

    Returns:
        [B, T, H, D].
    """
    rows, keys, values = group_heads(q, k, v, scale)
    capped = softcap(scores(rows, keys), cap)
    return ungroup_heads(weighted_values(probabilities(capped, mask), values))


def group_heads(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return scaled queries as rows, [B, K, H / K, T, D], and keys and values, [B, K, S, D]."""
    batch, length, _, width = q.shape
    scale = width**-0.5 if scale is None else scale
    rows = (q * scale).reshape(batch, length, k.shape[2], -1, width).transpose(0, 2, 3, 1, 4)
    return rows, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)


def ungroup_heads(rows: jax.Array) -> jax.Array:
    """[B, K, H / K, T, D] -> [B, T, H, D]."""
    batch, _, _, length, width = rows.shape
    return rows.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1, width)


def scores(rows: jax.Array, keys: jax.Array) -> jax.Array:
    """Return the dot product of each row and key, float32: [B, K, H / K, T, S]."""
    flat = rows.reshape(*rows.shape[:2], -1, rows.shape[-1])
    return (flat @ keys.swapaxes(-1, -2)).astype(jnp.float32).reshape(*rows.shape[:4], -1)


def probabilities(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the softmax of scores over the keys that the mask allows."""
    return jax.nn.softmax(jnp.where(mask[:, :, None], scores, _MASKED_SCORE), axis=-1)


def weighted_values(probabilities: jax.Array, values: jax.Array) -> jax.Array:
    """Return the sum of values weighted by probability: [B, K, H / K, T, D]."""
    flat = probabilities.reshape(*probabilities.shape[:2], -1, probabilities.shape[-1]).astype(
        values.dtype
    )
    return (flat @ values).reshape(*probabilities.shape[:4], -1)
