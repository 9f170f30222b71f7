"""The loss of a model on examples that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from tunix_mlflow.config.schema import DataConfig
from tunix_mlflow.data.examples import Example
from tunix_mlflow.input.batches import Batch, eval_batches
from tunix_mlflow.input.packing import LONGEST_FIT, fit_length, lay_out_rows
from tunix_mlflow.input.tokens import encode_examples, longest
from tunix_mlflow.models.bundle import Bundle
from tunix_mlflow.models.decoder import Graph, Params
from tunix_mlflow.training.losses import token_losses


def held_out_loss(bundle: Bundle, examples: Sequence[Example], batch_size: int) -> float:
    """Return the mean loss of what would be trained on of some examples, in nats per token.

    Args:
        bundle: the model; its examples are rendered, and their turns chosen, as in its training.
        examples: at least one. What is longer than the model's positions is cut.
        batch_size: rows at a time.

    Raises:
        DatasetError: if the template refuses an example, or none has a token to train on.
        ModelError: if it is not known what would be trained on.
    """
    tokenized = encode_examples(examples, bundle.tokenizer, bundle.data)
    length = min(fit_length(longest(tokenized)), bundle.config.max_positions or LONGEST_FIT)
    rows = lay_out_rows(tokenized, DataConfig(overlong="truncate"), length)
    sums = [_sums(bundle.params, batch, bundle.graph) for batch in eval_batches(rows, batch_size)]
    losses, counts = jax.device_get(tuple(zip(*sums, strict=True)))
    return float(np.sum(losses, dtype=np.float64) / np.sum(counts))


@partial(jax.jit, static_argnames="graph")
def _sums(params: Params, batch: Batch, graph: Graph) -> tuple[jax.Array, jax.Array]:
    return token_losses(graph, params, batch)
