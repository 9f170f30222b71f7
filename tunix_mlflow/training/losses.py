"""Next-token cross-entropy over the trained tokens of packed rows."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tunix_mlflow.data.batches import Batch
from tunix_mlflow.models.decoder import Decoder, Graph, Params, segment_mask


class Compute(NamedTuple):
    """How a forward and backward pass is computed."""

    dtype: str = "float32"  # of the products; sums of losses and gradients are float32
    remat: str = "none"  # what of a block is computed again in the backward pass
    loss_chunk: int = 0  # tokens whose logits are held at a time; 0: of all


PLAIN = Compute()


def token_losses(
    graph: Graph,
    params: Params,
    batch: Batch,
    compute: Compute = PLAIN,
    noise: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Summed loss and number of trained tokens; divide once, after the last sum.

    The shift, drawn once (a row of two examples, `.` = padding):

        tokens    <bos> 2 + 2 <answer> 4     <eos>   <bos> h i .
        targets   2     + 2 <answer> 4 <eos> .       h     i . .
        loss      0     0 0 0        1 1     0       ...

    Args:
        graph: the static part of the decoder.
        params: its parameters.
        batch: [B, T] arrays; `loss_mask` belongs to the target of its position.
        compute: how; all ways give the same up to rounding.
        noise: a key, where adapters leave out inputs at random.

    Returns:
        Sum of losses in nats, and the count, both float32 scalars.
    """
    model = nnx.merge(graph, params)
    tokens, targets, positions, segments, trained = map(jnp.asarray, batch)
    features, _ = model.features(
        tokens, positions, segment_mask(segments), remat=compute.remat, noise=noise
    )
    mask = trained.astype(jnp.float32)
    if compute.loss_chunk and compute.loss_chunk < tokens.size:
        return _in_chunks(model, features, targets, mask, compute.loss_chunk), jnp.sum(mask)
    return _summed(model, features, targets, mask), jnp.sum(mask)


def _summed(model: Decoder, features: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    logits = model.logits(features).astype(jnp.float32)
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, targets) * mask)


def _in_chunks(
    model: Decoder, features: jax.Array, targets: jax.Array, mask: jax.Array, size: int
) -> jax.Array:
    """The same; the logits of a chunk are made, used, and made again in the backward pass."""
    count = targets.size
    chunks = -(-count // size)

    def cut(x: jax.Array, width: tuple[int, ...]) -> jax.Array:
        flat = x.reshape(count, *width)
        flat = jnp.pad(flat, ((0, chunks * size - count), *((0, 0) for _ in width)))
        return flat.reshape(chunks, size, *width)

    @jax.checkpoint
    def add(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return total + _summed(model, *chunk), None

    parts = (cut(features, (features.shape[-1],)), cut(targets, ()), cut(mask, ()))
    return jax.lax.scan(add, jnp.zeros(()), parts)[0]
