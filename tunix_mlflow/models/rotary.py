"""Rotary position embeddings (Su et al. 2021).

Shapes in comments: B batch, T query length, D head width.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from tunix_mlflow.config.schema import RopeScaling
from tunix_mlflow.models import cpu_kernels


def frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> npt.NDArray[np.float32]:
    """Return the frequency of each pair of a head, in radians per position: [head_dim / 2].

    Args:
        head_dim: even.
        theta: base of the frequencies.
        scaling: stretches positions for a longer context: all frequencies alike (Chen et al.
            2023), or as Llama 3.1 does: low frequencies fully, high ones not, those between in
            part.
    """
    pairs = head_dim // 2
    result = theta ** (-np.arange(pairs, dtype=np.float64) / pairs)
    if scaling is None:
        return result.astype(np.float32)
    stretched = result / scaling.factor
    if scaling.kind == "linear":
        return stretched.astype(np.float32)
    rotations = scaling.original_positions * result / (2 * math.pi)  # in the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    weight = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    return (weight * result + (1 - weight) * stretched).astype(np.float32)


def rope_sin_cos(
    positions: jax.Array, frequency: npt.NDArray[np.float32] | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return sine and cosine of each pair's angle, [B, T, 1, D / 2] each, float32.

    Args:
        positions: [B, T], int32.
        frequency: [D / 2], from :func:`frequencies`.
    """
    angle = positions[..., None].astype(jnp.float32) * frequency  # [B, T, D / 2]
    both = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    both = jax.lax.platform_dependent(both, cpu=cpu_kernels.compute_once, default=lambda x: x)
    sin, cos = jnp.split(both[:, :, None], 2, axis=-1)
    return sin, cos


def rotate(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
    """Apply the rotary embedding; the pairs are the two halves of a head.

    Args:
        x: [B, T, heads, D], D even.
        sin: from :func:`rope_sin_cos`.
        cos: from :func:`rope_sin_cos`.

    Returns:
        [B, T, heads, D], in the dtype of `x`.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
