"""Next-token cross-entropy over the trained tokens of packed rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tunix_mlflow.data.batches import Batch
from tunix_mlflow.models.decoder import Graph, Params, segment_mask


def token_losses(graph: Graph, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Summed loss and number of trained tokens; divide once, after the last sum.

    The shift, drawn once (a row of two examples, `.` = padding):

        tokens    <bos> 2 + 2 <answer> 4     <eos>   <bos> h i .
        targets   2     + 2 <answer> 4 <eos> .       h     i . .
        loss      0     0 0 0        1 1     0       ...

    Args:
        graph: the static part of the decoder.
        params: its parameters.
        batch: [B, T] arrays; `loss_mask` belongs to the target of its position.

    Returns:
        Sum of losses in nats, and the count, both float32 scalars.
    """
    model = nnx.merge(graph, params)
    tokens, targets, positions, segments, trained = map(jnp.asarray, batch)
    logits, _ = model(tokens, positions, segment_mask(segments))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    mask = trained.astype(jnp.float32)
    return jnp.sum(losses * mask), jnp.sum(mask)
