"""Convert between the decoder's parameters and the tensor names of transformers.

Both take the halves of a head as rotary pairs. transformers stores linear layers transposed,
[outputs, inputs].
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
# Gemma has four norms per block, and uses post_attention_layernorm for another one of them.
_GEMMA_BLOCK = _BLOCK | {
    "attention_post_norm/scale": "post_attention_layernorm.weight",
    "mlp_norm/scale": "pre_feedforward_layernorm.weight",
    "mlp_post_norm/scale": "post_feedforward_layernorm.weight",
}
_ADAPTER = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
_TOP_LEVEL = {
    "embedding/embedding": TABLE,
    "final_norm/scale": "model.norm.weight",
    "unembedding/kernel": OUTPUT,
}


def named(params: Params, config: ModelConfig) -> dict[str, Any]:
    """Return every parameter by transformers' name, in our layout and order."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {_name(path, config): leaf for path, leaf in leaves}


def _name(path: Any, config: ModelConfig) -> str:
    ours = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
    if ours in _TOP_LEVEL:
        return _TOP_LEVEL[ours]
    _, layer, part = ours.split("/", 2)
    block = _GEMMA_BLOCK if config.post_norms else _BLOCK
    layer_path, _, leaf = part.rpartition("/")
    if leaf in _ADAPTER:  # PEFT's names
        kernel = block[f"{layer_path}/kernel"].removesuffix(".weight")
        return f"model.layers.{layer}.{kernel}.{_ADAPTER[leaf]}"
    return f"model.layers.{layer}.{block[part]}"


def transposed(name: str, array: Array) -> Array:
    """Convert an array between both layouts: transpose the kernel of a linear layer."""
    return array.T if array.ndim == 2 and name != TABLE else array


def to_names(params: Params, config: ModelConfig) -> dict[str, Array]:
    """Return every parameter by transformers' name, in its layout."""
    return {
        name: transposed(name, np.asarray(leaf)) for name, leaf in named(params, config).items()
    }


def _compare(
    shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Compare the shapes of tensors in a file with those of a model.

    Raises:
        ModelError: naming the first that is missing, unknown or of another shape.
    """
    for name in sorted({*shapes, *expected}):
        if name not in expected:
            raise ModelError(f"{where}: {name} is no tensor of this model")
        if name not in shapes:
            raise ModelError(f"{where}: {name} is missing")
        if tuple(shapes[name]) != tuple(expected[name]):
            raise ModelError(
                f"{where}: {name} has shape {list(shapes[name])}, expected {list(expected[name])}"
            )


def from_names(
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Array],
    like: Params,
    config: ModelConfig,
    where: str,
    put: Callable[[Array, Any], Any] = lambda array, _: array,
) -> Params:
    """Read parameters by transformers' names, one after the other; invert :func:`to_names`.

    Args:
        shapes: of all tensors in the source, in transformers' layout.
        read: returns the tensor of a name.
        like: parameters of the model, or their shapes and dtypes.
        config: of the model.
        where: name of the source in errors.
        put: returns an array on its device, given its leaf of `like`.

    Raises:
        ModelError: naming the tensor that is missing, unknown or of another shape; nothing was
            read.
    """
    leaves = named(like, config)
    expected = {
        name: transposed(name, np.broadcast_to(0, leaf.shape)).shape
        for name, leaf in leaves.items()
    }
    _compare(shapes, expected, where)
    values = [
        put(np.ascontiguousarray(transposed(name, read(name)), leaf.dtype), leaf)
        for name, leaf in leaves.items()
    ]
    params: Params = jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(like), values)
    return params
