"""The loss of a model on examples that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from tunix_mlflow.config.schema import DataConfig
from tunix_mlflow.data.examples import Example
from tunix_mlflow.errors import DatasetError
from tunix_mlflow.input.batches import Batch, eval_batches
from tunix_mlflow.input.packing import fit_length, lay_out_rows
from tunix_mlflow.input.tokens import Loss, encode_examples, longest
from tunix_mlflow.models.bundle import Bundle
from tunix_mlflow.models.decoder import Graph, Params
from tunix_mlflow.training.losses import PrecisionPolicy, logits_chunk, token_losses

_TOKENS = 16_384  # of a batch, at most; but at least one row


class HeldOutLoss(NamedTuple):
    """A loss, and what the examples lack in it."""

    loss: float  # nats per token
    truncated: int  # examples that are cut at the model's positions
    empty: int  # examples without a token to train on
    refused: list[str]  # a line on each example that cannot be encoded, and is left out
    losses: tuple[Loss, ...]  # what the tokens lack of what the examples say


def held_out_loss(bundle: Bundle, examples: Sequence[Example], batch_size: int) -> HeldOutLoss:
    """Return the mean loss of what would be trained on of some examples.

    Args:
        bundle: the model; its examples are rendered, and their turns chosen, as in its training.
        examples: at least one. What is longer than the model's positions is cut.
        batch_size: rows at a time, at most.

    Raises:
        DatasetError: if no example can be encoded, or none has a token to train on.
    """
    refused: list[str] = []
    tokenized = encode_examples(examples, bundle.tokenizer, bundle.data, refused)
    if not tokenized.count:
        raise DatasetError(refused[0])
    length = fit_length(longest(tokenized))
    length = min(length, bundle.config.max_positions or length)
    rows = lay_out_rows(tokenized, DataConfig(overlong="truncate"), length)
    vocab_size = bundle.config.vocab_size or bundle.tokenizer.vocab_size
    policy = PrecisionPolicy(loss_chunk=logits_chunk(vocab_size))
    sums = [
        _sums(bundle.params, batch, bundle.graph, policy)
        for batch in eval_batches(rows, min(batch_size, max(1, _TOKENS // length)))
    ]
    losses, counts = jax.device_get(tuple(zip(*sums, strict=True)))
    loss = float(np.sum(losses, dtype=np.float64) / np.sum(counts))
    return HeldOutLoss(loss, rows.truncated, rows.empty, refused, tokenized.losses)


@partial(jax.jit, static_argnames=("graph", "policy"))
def _sums(
    params: Params, batch: Batch, graph: Graph, policy: PrecisionPolicy
) -> tuple[jax.Array, jax.Array]:
    return token_losses(graph, params, batch, policy)
