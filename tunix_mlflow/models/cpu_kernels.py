"""What is computed in another way on a CPU, because XLA's own way is slower there.

The results are those of the plain computation up to rounding. Layers select these functions by
`jax.lax.platform_dependent`; only :func:`linear` is used on every platform. Shapes as in
`attention.py`; I inputs, O outputs of a linear layer.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from tunix_mlflow.models.attention import (
    group_heads,
    probabilities,
    scores,
    ungroup_heads,
    weighted_values,
)

_MIN_BLOCK = 128  # queries of a row in a block, at least


def compute_once(x: jax.Array) -> jax.Array:
    """Return `x` unchanged, bit for bit, but computed once.

    XLA on a CPU fuses sines into every layer and head that uses them, and recomputes them in the
    backward pass; an optimization barrier is dropped before fusion. A matmul is not fused, so its
    operand is computed once: this one is with the identity matrix.
    """
    return x @ jnp.eye(x.shape[-1])


def dot_product_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    scale: float | None = None,
    causal: bool = False,
) -> jax.Array:
    """Attend as `jax.nn.dot_product_attention` does, up to rounding.

    Args:
        q: [B, T, H, D].
        k: [B, S, K, D]; H is a multiple of K.
        v: [B, S, K, D].
        mask: [B, 1, T, S], true where a query may attend.
        scale: of the scores; None: D ** -0.5.
        causal: T is S, and no query may attend to a later key: scores of keys behind the last
            query of a block are not computed for that block.

    Returns:
        [B, T, H, D].
    """
    blocks = _block_count(q.shape[1]) if causal else 1
    return ungroup_heads(_blockwise_attention(*group_heads(q, k, v, scale), mask, blocks))


def _block_count(length: int) -> int:
    """Return the number of blocks of queries; each adds to compile time."""
    fitting = (n for n in (4, 2) if length % n == 0 and length // n >= _MIN_BLOCK)
    return next(fitting, 1)


def _blocks(length: int, keys: int, blocks: int) -> list[tuple[slice, slice]]:
    """Return the slice of queries of each block, and that of the keys that they may attend to."""
    if blocks == 1:
        return [(slice(0, length), slice(0, keys))]
    size = length // blocks
    return [
        (slice(start, start + size), slice(0, start + size)) for start in range(0, length, size)
    ]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blockwise_attention(
    rows: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array, blocks: int
) -> jax.Array:
    """Return [B, K, H / K, T, D].

    Of the arrays of the size of the scores only the probabilities are kept for the backward pass;
    XLA would keep three.
    """
    return _blockwise_attention_forward(rows, keys, values, mask, blocks)[0]


_Residuals = tuple[jax.Array, jax.Array, jax.Array, list[jax.Array]]


def _blockwise_attention_forward(
    rows: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array, blocks: int
) -> tuple[jax.Array, _Residuals]:
    results, kept = [], []
    for queries, seen in _blocks(rows.shape[3], keys.shape[2], blocks):
        block = scores(rows[:, :, :, queries], keys[:, :, seen])
        kept.append(probabilities(block, mask[:, :, queries, seen]).astype(values.dtype))
        results.append(weighted_values(kept[-1], values[:, :, seen]))
    return jnp.concatenate(results, axis=3), (rows, keys, values, kept)


def _blockwise_attention_backward(
    blocks: int, residuals: _Residuals, gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    rows, keys, values, kept = residuals
    d_rows = []
    d_keys, d_values = (jnp.zeros(x.shape, jnp.float32) for x in (keys, values))
    slices = _blocks(rows.shape[3], keys.shape[2], blocks)
    for (queries, seen), block in zip(slices, kept, strict=True):
        wide, d_block = block.astype(jnp.float32), gradient[:, :, :, queries]
        d_probabilities = scores(d_block, values[:, :, seen])
        d_scores = wide * (
            d_probabilities - jnp.sum(d_probabilities * wide, axis=-1, keepdims=True)
        )
        d_scores = d_scores.astype(rows.dtype)
        d_rows.append(weighted_values(d_scores, keys[:, :, seen]))
        unseen = ((0, 0), (0, 0), (0, keys.shape[2] - block.shape[-1]), (0, 0))
        d_keys += jnp.pad(_weighted_rows(d_scores, rows[:, :, :, queries]), unseen)
        d_values += jnp.pad(_weighted_rows(block, d_block), unseen)
    d_all_rows = jnp.concatenate(d_rows, axis=3)
    return d_all_rows, d_keys.astype(keys.dtype), d_values.astype(values.dtype), None


def _weighted_rows(weights: jax.Array, rows: jax.Array) -> jax.Array:
    """Return for each key the sum of rows by their weights for it: [B, K, S, D]."""
    flat, wide = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (weights, rows))
    return (wide.swapaxes(-1, -2) @ flat).swapaxes(-1, -2)


_blockwise_attention.defvjp(_blockwise_attention_forward, _blockwise_attention_backward)


@jax.custom_vjp
def linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return `x @ kernel`, [..., O], with a kernel gradient that is one matmul of two matrices.

    JAX's own is the transpose of a matmul, which XLA on a CPU copies: a tenth of a training
    step's time.

    Args:
        x: [..., I].
        kernel: [I, O].
    """
    return x @ kernel


def _linear_forward(
    x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ kernel, (x, kernel)


def _linear_backward(
    residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    rows, columns = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    return gradient @ kernel.T, rows.T @ columns


linear.defvjp(_linear_forward, _linear_backward)
