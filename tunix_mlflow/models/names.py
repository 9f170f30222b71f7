"""The decoder's parameters under the names that transformers gives them.

Both compute the same: rotary pairs are halves of a head. Products are stored the other way round
there, [outputs, inputs].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from tunix_mlflow.config import ModelConfig
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


def name_of(path: Any, config: ModelConfig) -> str:
    """transformers' name of a parameter, from its path in a tree."""
    ours = path_of(path)
    if ours in _WHOLE:
        return _WHOLE[ours]
    _, layer, part = ours.split("/", 2)
    block = _GEMMA_BLOCK if config.post_norms else _BLOCK
    product, _, leaf = part.rpartition("/")
    if leaf in _ADAPTER:  # as PEFT calls them
        kernel = block[f"{product}/kernel"].removesuffix(".weight")
        return f"model.layers.{layer}.{kernel}.{_ADAPTER[leaf]}"
    return f"model.layers.{layer}.{block[part]}"


def path_of(path: Any) -> str:
    """`blocks/0/mlp/up/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def named(params: Params, config: ModelConfig) -> dict[str, Any]:
    """transformers' name -> leaf, of every parameter, as they lie here."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {name_of(path, config): leaf for path, leaf in leaves}


def turned(name: str, array: Array) -> Array:
    """An array as the other side keeps it: products are turned round, all else is as it is."""
    return array.T if array.ndim == 2 and name != TABLE else array


def to_names(params: Params, config: ModelConfig) -> dict[str, Array]:
    """transformers' name -> array, as they lie there, of every parameter."""
    return {name: turned(name, np.asarray(leaf)) for name, leaf in named(params, config).items()}


def shapes(like: Params, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """transformers' name -> shape, as they lie there."""
    return {
        name: leaf.shape[::-1] if len(leaf.shape) == 2 and name != TABLE else leaf.shape
        for name, leaf in named(like, config).items()
    }


def compare(
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
    names: Iterable[str],
    read: Callable[[str], Array],
    like: Params,
    config: ModelConfig,
    where: str = "the weights",
    place: Callable[[Array, Any], Any] = lambda array, _: array,
) -> Params:
    """The parameters that :func:`to_names` named, one after the other.

    Args:
        names: all that there are.
        read: the array of a name, as it lies there.
        like: parameters, or shapes and types, of the model that they are for.
        config: its shape.
        where: what errors call the source.
        place: puts an array, given its leaf of `like`, where it shall be.

    Raises:
        ModelError: naming what is missing, unknown or of another shape.
    """
    wanted = shapes(like, config)
    present = set(names)
    compare({n: wanted.get(n, ()) for n in present}, wanted, where)
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    made = []
    for path, leaf in leaves:
        name = name_of(path, config)
        array = read(name)
        compare({name: array.shape}, {name: wanted[name]}, where)
        made.append(place(np.ascontiguousarray(turned(name, array), leaf.dtype), leaf))
    params: Params = jax.tree_util.tree_unflatten(structure, made)
    return params
