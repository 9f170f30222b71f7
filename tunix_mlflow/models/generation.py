"""Greedy generation for a batch of prompts, with a key/value cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx

from tunix_mlflow.config.schema import ModelConfig
from tunix_mlflow.models.decoder import Graph, Params, empty_cache
from tunix_mlflow.models.layers import LayerCache

_ENDED = -1  # in place of a token: the completion has ended
_EXACT_LIMIT = 64  # longer limits are rounded up, for the same reason as prompt widths
_PROMPT_MULTIPLE = 32  # prompt widths are rounded up, so that few shapes are compiled


class Generated(NamedTuple):
    """A completion."""

    ids: npt.NDArray[np.int32]  # [n], without the end of sequence
    cut_off: bool  # whether its limit ended it


def generate(
    graph: Graph,
    params: Params,
    prompts: Sequence[npt.NDArray[np.int32]],
    *,
    limits: Sequence[int],
    eos_ids: Sequence[int],
    pad_id: int,
) -> list[Generated]:
    """Continue each prompt with the most likely tokens until the end of sequence, or its limit.

    A completion depends on its own prompt and limit alone.

    Args:
        graph: static part of the decoder.
        params: its parameters.
        prompts: token ids, each [n], n at least 1.
        limits: most tokens of each completion, at least 1.
        eos_ids: tokens that end a completion; they are not returned.
        pad_id: pads prompts on the left.

    Returns:
        What was generated for each prompt.
    """
    width = max(len(p) for p in prompts)
    width = -(-width // _PROMPT_MULTIPLE) * _PROMPT_MULTIPLE
    rows = padded_rows(len(prompts))  # those beyond the prompts are copies, dropped
    tokens = np.full((rows, width), pad_id, np.int32)
    padding = np.zeros((rows,), np.int32)
    for row in range(rows):
        prompt = prompts[min(row, len(prompts) - 1)]
        padding[row] = width - len(prompt)
        tokens[row, padding[row] :] = prompt
    own_limits = np.array([limits[min(row, len(prompts) - 1)] for row in range(rows)], np.int32)
    tokens = np.asarray(
        _generate(
            params,
            tokens,
            padding,
            own_limits,
            graph=graph,
            max_new_tokens=_rounded(max(limits)),
            ends=tuple(sorted(set(eos_ids))),
        )
    )
    completions = []
    for generated, limit in zip(tokens, limits, strict=False):
        (ended,) = np.nonzero(generated[:limit] == _ENDED)
        ids = generated[: ended[0]] if len(ended) else generated[:limit]
        completions.append(Generated(ids, cut_off=not len(ended)))
    return completions


def padded_rows(prompts: int) -> int:
    """Return the rows that are computed for some prompts: one or a multiple of 8, as few shapes."""
    return 1 if prompts == 1 else -(-prompts // 8) * 8


def cache_bytes(config: ModelConfig, prompt: int, limit: int, itemsize: int) -> int:
    """Return the bytes that the key/value cache of one row needs.

    Args:
        config: of the decoder.
        prompt: tokens of the longest prompt beside it.
        limit: most tokens of a completion.
        itemsize: bytes of a value.
    """
    length = -(-prompt // _PROMPT_MULTIPLE) * _PROMPT_MULTIPLE + _rounded(limit)
    return 2 * config.layers * config.kv_heads * config.head_width * length * itemsize


def _rounded(limit: int) -> int:
    """Return the limit that is compiled for: exact if it is small, else one of few."""
    return limit if limit <= _EXACT_LIMIT else -(-limit // _EXACT_LIMIT) * _EXACT_LIMIT


@partial(jax.jit, static_argnames=("graph", "max_new_tokens", "ends"))
def _generate(
    params: Params,
    tokens: jax.Array,  # [B, P], padded on the left
    padding: jax.Array,  # [B]
    limits: jax.Array,  # [B]
    *,
    graph: Graph,
    max_new_tokens: int,
    ends: tuple[int, ...],
) -> jax.Array:  # [B, max_new_tokens], _ENDED behind the completion
    model = nnx.merge(graph, params)
    batch, width = tokens.shape
    length = width + max_new_tokens
    slots = jnp.arange(length)
    is_token = slots[None, :] >= padding[:, None]  # [B, S], false for padding

    def mask(queries: jax.Array) -> jax.Array:  # [T] slots -> [B, 1, T, S]
        return (is_token[:, None, :] & (slots[None, None, :] <= queries[None, :, None]))[:, None]

    def most_likely(features: jax.Array) -> jax.Array:  # [B, T, W] -> [B]
        token = jnp.argmax(model.logits(features[:, -1]), axis=-1).astype(jnp.int32)
        return jnp.where(jnp.isin(token, jnp.asarray(ends, jnp.int32)), _ENDED, token)

    prompt_slots = jnp.arange(width)
    cache = empty_cache(model.config, batch, length, jax.tree.leaves(params)[0].dtype)
    positions = jnp.maximum(prompt_slots[None, :] - padding[:, None], 0)
    features, cache = model.features(tokens, positions, mask(prompt_slots), cache)
    first = most_likely(features)
    result = jnp.full((batch, max_new_tokens), _ENDED, jnp.int32).at[:, 0].set(first)

    def unfinished(carry: tuple[jax.Array, jax.Array, jax.Array, list[LayerCache]]) -> jax.Array:
        count, last, _, _ = carry
        return jnp.any((last != _ENDED) & (count < limits))

    def extend(
        carry: tuple[jax.Array, jax.Array, jax.Array, list[LayerCache]],
    ) -> tuple[jax.Array, jax.Array, jax.Array, list[LayerCache]]:
        count, last, result, cache = carry
        slot = width + count - 1  # of `last`
        features, cache = model.features(
            jnp.maximum(last, 0)[:, None], (slot - padding)[:, None], mask(slot[None]), cache, slot
        )
        token = jnp.where(last == _ENDED, _ENDED, most_likely(features))
        return count + 1, token, result.at[:, count].set(token), cache

    start = (jnp.int32(1), first, result, cache)
    return jax.lax.while_loop(unfinished, extend, start)[2]
