"""Convert between `config.json`, as transformers writes it, and a decoder's configuration.

A key that is unknown, or a value that is not implemented, is an error that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from tunix_mlflow.config.schema import GEMMA, ModelConfig, RopeScaling
from tunix_mlflow.errors import ModelError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
# Keys that change no logit: names, initialization, settings of generation.
_IGNORED = frozenset(
    (
        *("_name_or_path", "architectures", "model_type", "transformers_version"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "cache_implementation"),
        *("dtype", "torch_dtype", "initializer_range", "chunk_size_feed_forward"),
        *("id2label", "label2id", "problem_type", "is_encoder_decoder", "return_dict"),
        *("output_attentions", "output_hidden_states", "_attn_implementation_autoset"),
        *("attn_implementation", "is_llama_config", "transformers.js_config"),
        *("unsloth_fixed", "unsloth_version", "sliding_window_size"),
    )
)
# The only values that are implemented. None counts as absent.
_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "attention_dropout": (0, 0.0),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "use_bidirectional_attention": (False,),
    "partial_rotary_factor": (1, 1.0),
}
_SIZES = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "mlp_width",
    "max_position_embeddings": "max_positions",
    "rms_norm_eps": "norm_epsilon",
}
_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_positions",
}
# transformers' defaults of keys that a file leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10_000.0},
    "qwen2": {
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_theta": 10_000.0,
        "num_key_value_heads": 32,
        "max_window_layers": 28,
    },
    "qwen3": {
        "num_key_value_heads": 32,
        "max_window_layers": 28,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_theta": 10_000.0,
        "head_dim": 128,
    },
    "gemma2": {
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_theta": 10_000.0,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
    },
    "gemma3_text": {
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
}


class _Keys:
    """The keys of a config.json, and which of them were read."""

    def __init__(self, tree: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
        self.tree, self.defaults, self.where = tree, defaults, where
        self.read: set[str] = set()

    def get(self, key: str) -> Any:
        self.read.add(key)
        return self.tree[key] if key in self.tree else self.defaults.get(key)

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ModelError(f"{self.where}: {key} is missing")
        return value

    def refuse(self, key: str, value: Any, wanted: str) -> ModelError:
        """Return the error for a value that is not implemented."""
        return ModelError(f"{self.where}: {key} is {value!r}; only {wanted} is implemented")


def read(tree: Mapping[str, Any], where: str) -> ModelConfig:
    """Return the decoder's configuration that a config.json describes.

    Args:
        tree: content of the file, of transformers 4 or 5.
        where: name of the file in errors.

    Raises:
        ModelError: naming the key that is missing, unknown, or not implemented.
    """
    try:
        return _read(tree, where)
    except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError) as error:
        raise ModelError(f"{where}: a value is of the wrong kind: {error}") from error


def _read(tree: Mapping[str, Any], where: str) -> ModelConfig:
    family = tree.get("model_type")
    if family not in ARCHITECTURES:
        hint = "; use its text model alone" if "text_config" in tree else ""
        raise ModelError(
            f"{where}: model_type {family!r} is not implemented{hint}; implemented are"
            f" {', '.join(ARCHITECTURES)}"
        )
    keys = _Keys(tree, _DEFAULTS[family], where)
    fields: dict[str, Any] = {"family": family}
    for theirs, ours in _SIZES.items():
        optional = theirs in ("head_dim", "num_key_value_heads", "max_position_embeddings")
        fields[ours] = keys.get(theirs) if optional else keys.need(theirs)
    fields["kv_heads"] = fields["kv_heads"] or fields["heads"]
    if fields["head_dim"] and fields["head_dim"] * fields["heads"] == fields["width"]:
        fields["head_dim"] = None  # the default, with the same value
    fields["tie_embeddings"] = keys.need("tie_word_embeddings")
    fields |= _rotary(keys, family) | _windows(keys, family, fields["layers"])
    _activation(keys, family)
    if family in GEMMA:
        fields["query_scale"] = keys.need("query_pre_attn_scalar")
        fields["attention_softcap"] = keys.get("attn_logit_softcapping")
        fields["logit_softcap"] = keys.get("final_logit_softcapping")
    for key, allowed in _FIXED.items():
        value = keys.get(key)
        if value is not None and value not in allowed:
            raise keys.refuse(key, value, repr(allowed[0]))
    given = {key for key, value in tree.items() if value is not None}
    unknown = sorted(given - keys.read - _IGNORED)
    if unknown:
        raise ModelError(
            f"{where}: {unknown[0]}={keys.tree[unknown[0]]!r} is not known to this version of"
            " tunix-mlflow, so its logits could be wrong"
        )
    return _checked(fields, where)


def _checked(fields: Mapping[str, Any], where: str) -> ModelConfig:
    try:
        result = msgspec.convert({k: v for k, v in fields.items() if v is not None}, ModelConfig)
    except msgspec.ValidationError as error:
        raise ModelError(f"{where}: {error}") from error
    if result.heads % result.kv_heads or result.head_width % 2:
        raise ModelError(
            f"{where}: {result.heads} heads of width {result.head_width} and {result.kv_heads}"
            " key/value heads do not go together"
        )
    return result


def _rotary(keys: _Keys, family: str) -> dict[str, Any]:
    """Return rotary bases and scaling, of full and of windowed layers, in either spelling."""
    given = keys.get("rope_parameters")
    theta, scaling = keys.get("rope_theta"), keys.get("rope_scaling") or {}
    local = keys.get("rope_local_base_freq")
    if given is not None:  # transformers 5
        if "full_attention" in given:
            sliding = given.get("sliding_attention") or {}
            if sliding.get("rope_type", "default") != "default":
                raise keys.refuse("rope_parameters", sliding, "plain positions in windowed layers")
            local = sliding.get("rope_theta", local)
            given = given["full_attention"] or {}
        scaling = {k: v for k, v in given.items() if k != "rope_theta"}
        theta = given.get("rope_theta", theta)
    fields: dict[str, Any] = {"rope_theta": float(theta)}
    if local is not None and family == "gemma3_text":
        fields["window_rope_theta"] = float(local)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return fields
    if kind not in ("linear", "llama3"):
        raise keys.refuse("rope_type", kind, "'default', 'linear' or 'llama3'")
    rest = {k: v for k, v in scaling.items() if k not in ("rope_type", "type") and v is not None}
    for key in rest:
        if key not in _SCALING:
            raise ModelError(f"{keys.where}: {key} of rope scaling is not implemented")
    if "factor" not in rest:
        raise ModelError(f"{keys.where}: rope scaling has no factor")
    if kind == "llama3" and "original_max_position_embeddings" not in rest:
        raise ModelError(f"{keys.where}: rope scaling has no original_max_position_embeddings")
    numbers: dict[str, Any] = {_SCALING[key]: _number(key, v) for key, v in rest.items()}
    fields["rope_scaling"] = RopeScaling(kind=kind, **numbers)
    return fields


def _number(key: str, value: Any) -> int | float:
    return int(value) if key == "original_max_position_embeddings" else float(value)


def _windows(keys: _Keys, family: str, layers: int) -> dict[str, Any]:
    """Return the attention window and the layers that have it, in any spelling."""
    window, kinds = keys.get("sliding_window"), keys.get("layer_types")
    pattern = keys.get("_sliding_window_pattern") or keys.get("sliding_window_pattern")
    keys.read.add("sliding_window_pattern")
    used, first = keys.get("use_sliding_window"), keys.get("max_window_layers")
    if family == "llama":
        if window is not None or kinds is not None:
            raise keys.refuse("sliding_window", window, "a llama without windows")
        return {}
    if kinds is None:
        if family == "gemma2":
            windows = [not layer % 2 for layer in range(layers)]
        elif family == "gemma3_text":
            windows = [bool((layer + 1) % pattern) for layer in range(layers)]
        else:
            windows = [bool(used) and layer >= (first or 0) for layer in range(layers)]
    else:
        unknown = set(kinds) - {"full_attention", "sliding_attention"}
        if unknown or len(kinds) != layers:
            raise keys.refuse("layer_types", kinds, "full or sliding attention, one a layer,")
        windows = [kind == "sliding_attention" for kind in kinds]
    windowed = tuple(layer for layer, is_windowed in enumerate(windows) if is_windowed)
    if windowed and window is None:
        raise ModelError(f"{keys.where}: sliding_window is missing")
    return {"window": window, "windowed_layers": windowed} if windowed else {}


def _activation(keys: _Keys, family: str) -> None:
    for key in ("hidden_act", "hidden_activation"):
        value = keys.get(key)
        wanted = "gelu_pytorch_tanh" if family in GEMMA else "silu"
        if value is not None and value != wanted:
            raise keys.refuse(key, value, repr(wanted))


def write(model: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """Return the config.json of a decoder, for transformers 4.53 and later."""
    tree: dict[str, Any] = {
        "architectures": [ARCHITECTURES[model.family]],
        "model_type": model.family,
        "tie_word_embeddings": model.tie_embeddings,
        "rope_theta": model.rope_theta,
        "attention_bias": False,
        "attention_dropout": 0.0,
    }
    for theirs, ours in _SIZES.items():
        value = getattr(model, ours)
        if value is not None:
            tree[theirs] = value
    tree |= {"vocab_size": model.vocab_size or vocab_size, "head_dim": model.head_width}
    if model.rope_scaling is not None:
        tree["rope_scaling"] = {"rope_type": model.rope_scaling.kind} | {
            theirs: getattr(model.rope_scaling, ours)
            for theirs, ours in _SCALING.items()
            if theirs == "factor" or model.rope_scaling.kind == "llama3"
        }
    if model.family in GEMMA:
        tree |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": _whole(model.query_scale or model.head_width),
            "attn_logit_softcapping": model.attention_softcap,
            "final_logit_softcapping": model.logit_softcap,
        }
    else:
        tree["hidden_act"] = "silu"
    if model.family != "llama":
        windows = model.windowed_layers
        tree["layer_types"] = [
            "sliding_attention" if layer in windows else "full_attention"
            for layer in range(model.layers)
        ]
        tree["sliding_window"] = model.window
    if model.family in ("qwen2", "qwen3"):
        tree["use_sliding_window"] = bool(model.windowed_layers)
        tree["max_window_layers"] = min(model.windowed_layers, default=model.layers)
    if model.family == "gemma3_text":
        tree["rope_local_base_freq"] = model.window_rope_theta or model.rope_theta
    return tree


def _whole(value: float) -> float:
    """Return a whole number as an int, which transformers 5 insists on."""
    return int(value) if float(value).is_integer() else value
