"""Low-rank adapters beside a model's parameters (Hu et al. 2021): made, joined, merged."""

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
    """Adapters to begin with, float32, as NumPy arrays: A normal, B zero, so that they add nothing.

    Args:
        config: the model's shape.
        vocab_size: rows of its table.
        lora: rank and targets.
        seed: of the run.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(shape(config, vocab_size, lora))
    made = []
    for number, (path, leaf) in enumerate(leaves):
        if "lora_a" in jax.tree_util.keystr(path):
            made.append(decoder.normal(leaf.shape, leaf.shape[0], seed, number))
        else:
            made.append(np.zeros(leaf.shape, np.float32))
    adapters: Params = jax.tree_util.tree_unflatten(structure, made)
    return adapters


def shape(config: ModelConfig, vocab_size: int, lora: LoraConfig) -> Params:
    """Shapes and types in place of adapters."""
    params = decoder.shape(config, vocab_size, lora=lora)[1]
    adapters: Params = nnx.split_state(params, nnx.LoRAParam, ...)[0]
    return adapters


def joined(trained: Params, frozen: Params | None) -> Params:
    """All parameters of a decoder: adapters and its own; or those alone, where none is frozen."""
    if frozen is None:
        return trained
    both: Params = nnx.merge_state(trained, frozen)
    return both


def merged(adapters: Params, base: Params, lora: LoraConfig) -> Params:
    """The parameters of a plain decoder that computes the same: alpha / rank * A B added."""
    own: Any = nnx.to_pure_dict(adapters)
    plain: Any = nnx.to_pure_dict(base)
    scale = lora.alpha / lora.rank

    def added(kernels: Any, pairs: Any) -> Any:
        if "lora_a" in pairs:
            wide = jnp.asarray(pairs["lora_a"]) @ jnp.asarray(pairs["lora_b"])
            return {**kernels, "kernel": kernels["kernel"] + scale * wide}
        return {k: added(v, pairs[k]) if k in pairs else v for k, v in kernels.items()}

    made: Params = jax.tree.map(lambda leaf: leaf, base)
    nnx.replace_by_pure_dict(made, added(plain, own))
    return made
