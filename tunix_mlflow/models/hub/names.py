"""The decoder's parameters under the names that transformers gives them.

Both compute the same: rotary pairs are halves of a head. Products are stored the other way round
there, [outputs, inputs].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from tunix_mlflow.config.schema import ModelConfig
from tunix_mlflow.errors import ModelError
from tunix_mlflow.models.decoder import Params

Array = npt.NDArray[Any]

TABLE = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
_BLOCK = {
    "attention_norm/scale": "input_layernorm.weight",
    "attention/queries/kernel": "self_attn.q_proj.weight",
    "attention/queries/bias": "self_attn.q_proj.bias",
    "attention/keys/kernel": "self_attn.k_proj.weight",
    "attention/keys/bias": "self_attn.k_proj.bias",
    "attention/values/kernel": "self_attn.v_proj.weight",
    "attention/values/bias": "self_attn.v_proj.bias",
    "attention/output/kernel": "self_attn.o_proj.weight",
    "attention/query_norm/scale": "self_attn.q_norm.weight",
    "attention/key_norm/scale": "self_attn.k_norm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "mlp/gate/kernel": "mlp.gate_proj.weight",
    "mlp/up/kernel": "mlp.up_proj.weight",
    "mlp/down/kernel": "mlp.down_proj.weight",
}
# Gemma has four norms a block, and gives one of the usual names to another.
_GEMMA_BLOCK = _BLOCK | {
    "attention_post_norm/scale": "post_attention_layernorm.weight",
    "mlp_norm/scale": "pre_feedforward_layernorm.weight",
    "mlp_post_norm/scale": "post_feedforward_layernorm.weight",
}
_ADAPTER = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
_WHOLE = {
    "embedding/embedding": TABLE,
    "final_norm/scale": "model.norm.weight",
    "unembedding/kernel": OUTPUT,
}


def named(params: Params, config: ModelConfig) -> dict[str, Any]:
    """transformers' name -> leaf, of every parameter, as they lie here and in their order."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {_name(path, config): leaf for path, leaf in leaves}


def _name(path: Any, config: ModelConfig) -> str:
    ours = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
    if ours in _WHOLE:
        return _WHOLE[ours]
    _, layer, part = ours.split("/", 2)
    block = _GEMMA_BLOCK if config.post_norms else _BLOCK
    product, _, leaf = part.rpartition("/")
    if leaf in _ADAPTER:  # as PEFT calls them
        kernel = block[f"{product}/kernel"].removesuffix(".weight")
        return f"model.layers.{layer}.{kernel}.{_ADAPTER[leaf]}"
    return f"model.layers.{layer}.{block[part]}"


def turned(name: str, array: Array) -> Array:
    """An array as the other side keeps it: products are turned round, all else is as it is."""
    return array.T if array.ndim == 2 and name != TABLE else array


def to_names(params: Params, config: ModelConfig) -> dict[str, Array]:
    """transformers' name -> array, as they lie there, of every parameter."""
    return {name: turned(name, np.asarray(leaf)) for name, leaf in named(params, config).items()}


def _compare(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Hold the tensors of a file against those of a model.

    Raises:
        ModelError: naming the first that is missing, unknown or of another shape.
    """
    for name in sorted({*found, *wanted}):
        if name not in wanted:
            raise ModelError(f"{where}: {name} is no tensor of this model")
        if name not in found:
            raise ModelError(f"{where}: {name} is missing")
        if tuple(found[name]) != tuple(wanted[name]):
            raise ModelError(
                f"{where}: {name} has shape {list(found[name])}, expected {list(wanted[name])}"
            )


def from_names(
    found: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Array],
    like: Params,
    config: ModelConfig,
    where: str,
    place: Callable[[Array, Any], Any] = lambda array, _: array,
) -> Params:
    """The parameters that :func:`to_names` named, one after the other.

    Args:
        found: shapes of all that there are, as they lie there.
        read: the array of a name.
        like: parameters, or shapes and types, of the model that they are for.
        config: its shape.
        where: what errors call the source.
        place: puts an array, given its leaf of `like`, where it shall be.

    Raises:
        ModelError: naming what is missing, unknown or of another shape; nothing was read.
    """
    wanted = named(like, config)
    shapes = {
        name: turned(name, np.broadcast_to(0, leaf.shape)).shape for name, leaf in wanted.items()
    }
    _compare(found, shapes, where)
    made = [
        place(np.ascontiguousarray(turned(name, read(name)), leaf.dtype), leaf)
        for name, leaf in wanted.items()
    ]
    params: Params = jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(like), made)
    return params
