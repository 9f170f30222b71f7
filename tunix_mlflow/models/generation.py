"""Greedy generation for a batch of prompts, with a key/value cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx

from tunix_mlflow.models.decoder import Graph, LayerCache, Params, empty_cache

_PROMPT_MULTIPLE = 32  # prompt widths are rounded up, so that few shapes are compiled


def generate(
    graph: Graph,
    params: Params,
    prompts: Sequence[npt.NDArray[np.int32]],
    *,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
) -> list[npt.NDArray[np.int32]]:
    """Continue each prompt with the likeliest token until the end of sequence.

    Args:
        graph: static part of the decoder.
        params: its parameters.
        prompts: token ids, each [n], n at least 1.
        max_new_tokens: tokens generated at most.
        eos_id: ends a completion; it is not returned.
        pad_id: fills prompts up on the left.

    Returns:
        The new ids of each prompt, without the end of sequence.
    """
    width = max(len(p) for p in prompts)
    width = -(-width // _PROMPT_MULTIPLE) * _PROMPT_MULTIPLE
    # A multiple of 8 rows, for the same reason; the added rows are copies and are dropped.
    rows = -(-len(prompts) // 8) * 8
    tokens = np.full((rows, width), pad_id, np.int32)
    padding = np.zeros((rows,), np.int32)
    for row in range(rows):
        prompt = prompts[min(row, len(prompts) - 1)]
        padding[row] = width - len(prompt)
        tokens[row, padding[row] :] = prompt
    made = np.asarray(
        _generate(
            params, tokens, padding, graph=graph, max_new_tokens=max_new_tokens, eos_id=eos_id
        )
    )
    completions = []
    for row in made[: len(prompts)]:
        (ends,) = np.nonzero(row == eos_id)
        completions.append(row[: ends[0]] if len(ends) else row)
    return completions


@partial(jax.jit, static_argnames=("graph", "max_new_tokens", "eos_id"))
def _generate(
    params: Params,
    tokens: jax.Array,  # [B, P], filled up on the left
    padding: jax.Array,  # [B]
    *,
    graph: Graph,
    max_new_tokens: int,
    eos_id: int,
) -> jax.Array:  # [B, max_new_tokens], eos after the end
    model = nnx.merge(graph, params)
    batch, width = tokens.shape
    length = width + max_new_tokens
    slots = jnp.arange(length)
    real = slots[None, :] >= padding[:, None]  # [B, S]

    def look(queries: jax.Array) -> jax.Array:  # [T] slot numbers -> [B, 1, T, S]
        return (real[:, None, :] & (slots[None, None, :] <= queries[None, :, None]))[:, None]

    prompt_slots = jnp.arange(width)
    cache = empty_cache(model.config, batch, length, jax.tree.leaves(params)[0].dtype)
    positions = jnp.maximum(prompt_slots[None, :] - padding[:, None], 0)
    logits, cache = model(tokens, positions, look(prompt_slots), cache)
    first = jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32)
    made = jnp.full((batch, max_new_tokens), eos_id, jnp.int32).at[:, 0].set(first)

    def unfinished(carry: tuple[jax.Array, jax.Array, jax.Array, list[LayerCache]]) -> jax.Array:
        count, last, _, _ = carry
        return (count < max_new_tokens) & jnp.any(last != eos_id)

    def extend(
        carry: tuple[jax.Array, jax.Array, jax.Array, list[LayerCache]],
    ) -> tuple[jax.Array, jax.Array, jax.Array, list[LayerCache]]:
        count, last, made, cache = carry
        slot = width + count - 1  # where `last` stands
        logits, cache = model(
            last[:, None], (slot - padding)[:, None], look(slot[None]), cache, slot
        )
        token = jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32)
        token = jnp.where(last == eos_id, eos_id, token)
        return count + 1, token, made.at[:, count].set(token), cache

    _, _, made, _ = jax.lax.while_loop(unfinished, extend, (jnp.int32(1), first, made, cache))
    return made
