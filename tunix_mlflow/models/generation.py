"""Greedy generation for a batch of prompts, with a key/value cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx

from tunix_mlflow.models.decoder import Graph, Params, empty_cache
from tunix_mlflow.models.layers import LayerCache

_OVER = -1  # in place of a token: the completion has ended
_PROMPT_MULTIPLE = 32  # prompt widths are rounded up, so that few shapes are compiled


def generate(
    graph: Graph,
    params: Params,
    prompts: Sequence[npt.NDArray[np.int32]],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
) -> list[npt.NDArray[np.int32]]:
    """Continue each prompt with the likeliest token until the end of sequence.

    Args:
        graph: static part of the decoder.
        params: its parameters.
        prompts: token ids, each [n], n at least 1.
        max_new_tokens: tokens generated at most.
        eos_ids: each ends a completion; it is not returned.
        pad_id: fills prompts up on the left.

    Returns:
        The new ids of each prompt, without the end of sequence.
    """
    width = max(len(p) for p in prompts)
    width = -(-width // _PROMPT_MULTIPLE) * _PROMPT_MULTIPLE
    # One row or a multiple of 8, for the same reason; added rows are copies and are dropped.
    rows = 1 if len(prompts) == 1 else -(-len(prompts) // 8) * 8
    tokens = np.full((rows, width), pad_id, np.int32)
    padding = np.zeros((rows,), np.int32)
    for row in range(rows):
        prompt = prompts[min(row, len(prompts) - 1)]
        padding[row] = width - len(prompt)
        tokens[row, padding[row] :] = prompt
    ends = tuple(sorted(set(eos_ids)))
    made = np.asarray(
        _generate(params, tokens, padding, graph=graph, max_new_tokens=max_new_tokens, ends=ends)
    )
    completions = []
    for row in made[: len(prompts)]:
        (over,) = np.nonzero(row == _OVER)
        completions.append(row[: over[0]] if len(over) else row)
    return completions


@partial(jax.jit, static_argnames=("graph", "max_new_tokens", "ends"))
def _generate(
    params: Params,
    tokens: jax.Array,  # [B, P], filled up on the left
    padding: jax.Array,  # [B]
    *,
    graph: Graph,
    max_new_tokens: int,
    ends: tuple[int, ...],
) -> jax.Array:  # [B, max_new_tokens], _OVER from the end on
    model = nnx.merge(graph, params)
    batch, width = tokens.shape
    length = width + max_new_tokens
    slots = jnp.arange(length)
    real = slots[None, :] >= padding[:, None]  # [B, S]

    def look(queries: jax.Array) -> jax.Array:  # [T] slot numbers -> [B, 1, T, S]
        return (real[:, None, :] & (slots[None, None, :] <= queries[None, :, None]))[:, None]

    def likeliest(features: jax.Array) -> jax.Array:  # [B, T, W] -> [B]
        token = jnp.argmax(model.logits(features[:, -1]), axis=-1).astype(jnp.int32)
        return jnp.where(jnp.isin(token, jnp.asarray(ends, jnp.int32)), _OVER, token)

    prompt_slots = jnp.arange(width)
    cache = empty_cache(model.config, batch, length, jax.tree.leaves(params)[0].dtype)
    positions = jnp.maximum(prompt_slots[None, :] - padding[:, None], 0)
    features, cache = model.features(tokens, positions, look(prompt_slots), cache)
    first = likeliest(features)
    made = jnp.full((batch, max_new_tokens), _OVER, jnp.int32).at[:, 0].set(first)

    def unfinished(carry: tuple[jax.Array, jax.Array, jax.Array, list[LayerCache]]) -> jax.Array:
        count, last, _, _ = carry
        return (count < max_new_tokens) & jnp.any(last != _OVER)

    def extend(
        carry: tuple[jax.Array, jax.Array, jax.Array, list[LayerCache]],
    ) -> tuple[jax.Array, jax.Array, jax.Array, list[LayerCache]]:
        count, last, made, cache = carry
        slot = width + count - 1  # where `last` stands
        features, cache = model.features(
            jnp.maximum(last, 0)[:, None], (slot - padding)[:, None], look(slot[None]), cache, slot
        )
        token = jnp.where(last == _OVER, _OVER, likeliest(features))
        return count + 1, token, made.at[:, count].set(token), cache

    _, _, made, _ = jax.lax.while_loop(unfinished, extend, (jnp.int32(1), first, made, cache))
    return made
