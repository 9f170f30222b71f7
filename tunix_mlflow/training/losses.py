"""Next-token cross-entropy over the trained tokens of packed rows."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tunix_mlflow.input.batches import Batch
from tunix_mlflow.models.decoder import Decoder, Graph, Params, segment_mask


class PrecisionPolicy(NamedTuple):
    """How a forward and backward pass is computed."""

    dtype: str = "float32"  # of matmuls; sums of losses and gradients are float32
    remat: str = "none"  # what of a block the backward pass recomputes
    loss_chunk: int = 0  # tokens whose logits are held at a time; 0: all


FLOAT32 = PrecisionPolicy()
_LOGITS_BYTES = 256 * 2**20


def logits_chunk(vocab_size: int) -> int:
    """Return how many tokens have 256 MB of float32 logits, at least 1."""
    return max(1, _LOGITS_BYTES // (4 * vocab_size))


def token_losses(
    graph: Graph,
    params: Params,
    batch: Batch,
    policy: PrecisionPolicy = FLOAT32,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return the summed loss and the number of trained tokens; divide once, after the last sum.

    The shift, drawn once (a row of two examples, `.` = padding):

        tokens    <bos> 2 + 2 <answer> 4     <eos>   <bos> h i .
        targets   2     + 2 <answer> 4 <eos> .       h     i . .
        loss      0     0 0 0        1 1     0       ...

    Args:
        graph: the static part of the decoder.
        params: its parameters.
        batch: [B, T] arrays; `loss_mask` belongs to the target of its position.
        policy: how; every policy of one type gives the same up to rounding.
        dropout_key: of LoRA's dropout; None: no dropout.

    Returns:
        Sum of losses in nats, and the count, both float32 scalars.
    """
    model = nnx.merge(graph, params)
    tokens, targets, positions, segments, trained = map(jnp.asarray, batch)
    features, _ = model.features(
        tokens, positions, segment_mask(segments), remat=policy.remat, dropout_key=dropout_key
    )
    # On two axes: XLA's elementwise code on a CPU is slower for three.
    features = features.reshape(-1, features.shape[-1])
    targets, mask = targets.reshape(-1), trained.reshape(-1).astype(jnp.float32)
    if policy.loss_chunk and policy.loss_chunk < tokens.size:
        return _in_chunks(model, features, targets, mask, policy.loss_chunk), jnp.sum(mask)
    return cross_entropy(model.logits(features), targets, mask), jnp.sum(mask)


@jax.custom_vjp
def cross_entropy(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the summed loss in nats, float32.

    Only the logits are saved for the backward pass, where JAX saves their exponentials too.

    Args:
        logits: [N, vocab].
        targets: [N], int32.
        mask: [N], float32: the weight of each.
    """
    return _cross_entropy(logits, targets, mask)[0]


_Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _cross_entropy(
    logits: jax.Array, targets: jax.Array, mask: jax.Array
) -> tuple[jax.Array, _Residuals]:
    wide = logits.astype(jnp.float32)
    total = jax.nn.logsumexp(wide, axis=-1)
    own = jnp.take_along_axis(wide, targets[:, None], axis=-1)[:, 0]
    return jnp.sum((total - own) * mask), (logits, total, targets, mask)


def _cross_entropy_backward(
    residuals: _Residuals, gradient: jax.Array
) -> tuple[jax.Array, None, None]:
    logits, total, targets, mask = residuals
    probabilities = jnp.exp(logits.astype(jnp.float32) - total[:, None])
    is_target = jax.lax.broadcasted_iota(jnp.int32, probabilities.shape, 1) == targets[:, None]
    back = jnp.where(is_target, probabilities - 1, probabilities) * (gradient * mask)[:, None]
    return back.astype(logits.dtype), None, None


cross_entropy.defvjp(_cross_entropy, _cross_entropy_backward)


def _in_chunks(
    model: Decoder, features: jax.Array, targets: jax.Array, mask: jax.Array, size: int
) -> jax.Array:
    """Return the summed loss; the logits of each chunk are recomputed in the backward pass."""
    count = targets.size
    chunks = -(-count // size)

    def cut(x: jax.Array) -> jax.Array:
        filled = jnp.pad(x, ((0, chunks * size - count), *((0, 0) for _ in x.shape[1:])))
        return filled.reshape(chunks, size, *x.shape[1:])

    @jax.checkpoint
    def add(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        own, *rest = chunk
        return total + cross_entropy(model.logits(own), *rest), None

    return jax.lax.scan(add, jnp.zeros(()), (cut(features), cut(targets), cut(mask)))[0]
