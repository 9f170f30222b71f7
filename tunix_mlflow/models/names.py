"""The decoder's parameters under the names that transformers gives a Llama's.

The two compute the same: rotary pairs are halves of a head, norms scale and have no bias. Products
are stored the other way round there, [outputs, inputs].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from tunix_mlflow.errors import IntegrityError
from tunix_mlflow.models.decoder import Params

_PARTS = {
    "attention_norm/scale": "input_layernorm.weight",
    "attention/queries/kernel": "self_attn.q_proj.weight",
    "attention/keys/kernel": "self_attn.k_proj.weight",
    "attention/values/kernel": "self_attn.v_proj.weight",
    "attention/output/kernel": "self_attn.o_proj.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "mlp/gate/kernel": "mlp.gate_proj.weight",
    "mlp/up/kernel": "mlp.up_proj.weight",
    "mlp/down/kernel": "mlp.down_proj.weight",
}
_WHOLE = {
    "embedding/embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "unembedding/kernel": "lm_head.weight",
}


def to_names(params: Params) -> dict[str, npt.NDArray[Any]]:
    """Llama's name -> array, for every parameter."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    found = {}
    for path, leaf in leaves:
        ours, name = _names(path)
        found[name] = np.asarray(leaf).T if ours.endswith("kernel") else np.asarray(leaf)
    return found


def from_names(weights: Mapping[str, npt.NDArray[Any]], like: Params) -> Params:
    """The parameters that :func:`to_names` named.

    Args:
        weights: name -> array.
        like: parameters, or shapes and types, of the model that they are for.

    Raises:
        IntegrityError: naming what is missing, unknown or of another shape.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    wanted = {_names(path)[1] for path, _ in leaves}
    if unknown := sorted(set(weights) - wanted):
        raise IntegrityError(f"{unknown[0]} is no parameter of this model")
    made = []
    for path, leaf in leaves:
        ours, name = _names(path)
        if name not in weights:
            raise IntegrityError(f"{name} is missing")
        array = weights[name].T if ours.endswith("kernel") else weights[name]
        if array.shape != leaf.shape:
            raise IntegrityError(f"{name} has shape {array.shape}, expected {leaf.shape}")
        made.append(np.ascontiguousarray(array, leaf.dtype))
    params: Params = jax.tree_util.tree_unflatten(structure, made)
    return params


def _names(path: Any) -> tuple[str, str]:
    """Ours and Llama's."""
    ours = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
    if ours in _WHOLE:
        return ours, _WHOLE[ours]
    _, layer, part = ours.split("/", 2)
    return ours, f"model.layers.{layer}.{_PARTS[part]}"
