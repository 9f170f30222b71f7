"""Low-rank adapters of a model (LoRA, Hu et al. 2021): initialize, join, merge."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tunix_mlflow.config.schema import LoraConfig, ModelConfig
from tunix_mlflow.models import decoder
from tunix_mlflow.models.decoder import Params


def init(config: ModelConfig, vocab_size: int, lora: LoraConfig, seed: int) -> Params:
    """Return initial adapters, float32, as NumPy arrays: A is normal, B is zero.

    Args:
        config: of the model.
        vocab_size: rows of its embedding.
        lora: rank and targets.
        seed: of the run.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(shape(config, vocab_size, lora))
    values = []
    for index, (path, leaf) in enumerate(leaves):
        if "lora_a" in jax.tree_util.keystr(path):
            values.append(decoder.normal(leaf.shape, leaf.shape[0], seed, index))
        else:
            values.append(np.zeros(leaf.shape, np.float32))
    adapters: Params = jax.tree_util.tree_unflatten(structure, values)
    return adapters


def shape(config: ModelConfig, vocab_size: int, lora: LoraConfig) -> Params:
    """Return shapes and dtypes in place of adapters."""
    params = decoder.shape(config, vocab_size, lora=lora)[1]
    adapters: Params = nnx.split_state(params, nnx.LoRAParam, ...)[0]
    return adapters


def joined(trained: Params, frozen: Params | None) -> Params:
    """Return all parameters of a decoder: the trained and, if there are any, the frozen ones."""
    if frozen is None:
        return trained
    both: Params = nnx.merge_state(trained, frozen)
    return both


def merged(adapters: Params, base: Params, lora: LoraConfig) -> Params:
    """Return parameters that compute the same without adapters: alpha / rank * A B is added."""
    updates: Any = nnx.to_pure_dict(adapters)
    kernels: Any = nnx.to_pure_dict(base)
    scale = lora.alpha / lora.rank

    def add(params: Any, updates: Any) -> Any:
        if "lora_a" in updates:
            update = jnp.asarray(updates["lora_a"]) @ jnp.asarray(updates["lora_b"])
            return {**params, "kernel": params["kernel"] + scale * update}
        return {k: add(v, updates[k]) if k in updates else v for k, v in params.items()}

    result: Params = jax.tree.map(lambda leaf: leaf, base)
    nnx.replace_by_pure_dict(result, add(kernels, updates))
    return result
