"""Read GGUF, the format of llama.cpp: the llama family with a byte-level BPE, quantized or not.

Two things are converted: quantized tensors, by the gguf package, and the order of the rows of
queries and keys, whose rotary pairs are neighbours in llama.cpp and halves of a head in
transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tunix_mlflow.errors import ModelError
from tunix_mlflow.files import one_line
from tunix_mlflow.models.hub import families, names
from tunix_mlflow.models.hub.names import Array
from tunix_mlflow.models.hub.pretrained import Source
from tunix_mlflow.text import chat_template

_BLOCK = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_TOP_LEVEL = {
    "token_embd.weight": names.TABLE,
    "output_norm.weight": "model.norm.weight",
    "output.weight": names.OUTPUT,
}
_CONTROL, _USER_DEFINED = 3, 4  # token types


def is_gguf(path: Path) -> bool:
    """Return whether a path names a GGUF file."""
    return path.suffix == ".gguf"


@contextmanager
def opened(path: Path) -> Iterator[Source]:
    """Open the model in a file.

    Raises:
        ModelError: if it is missing, damaged, or not implemented.
    """
    from gguf import quants

    reader = _reader(path)
    tensors = {_name(tensor.name, path): tensor for tensor in reader.tensors}
    if names.TABLE not in tensors:
        raise ModelError(f"{path}: token_embd.weight is missing")
    tree = _config(reader, path) | {
        "vocab_size": _shape(tensors[names.TABLE])[0],
        "tie_word_embeddings": names.OUTPUT not in tensors,
    }
    config = families.read(tree, str(path))
    heads = {"q_proj": config.heads, "k_proj": config.kv_heads}

    def read(name: str) -> Array:
        tensor = tensors[name]
        try:
            array: Array = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            array = array.reshape(_shape(tensor))
        except NotImplementedError as error:
            raise ModelError(f"{path}: {name} is quantized as {tensor.tensor_type.name}") from error
        except (ValueError, IndexError) as error:
            raise ModelError(f"{path}: {name} is damaged") from error
        part = name.split(".")[-2]
        return _to_halves(array, heads[part]) if part in heads else array

    yield Source(str(path), config, {n: _shape(t) for n, t in tensors.items()}, read)


def tokenizer_files(path: Path) -> dict[str, bytes]:
    """Return the tokenizer of a file, as the files of a folder in Hugging Face's layout.

    Raises:
        ModelError: if it is damaged or not implemented.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    reader = _reader(path)
    kind, split = (_value(reader, f"tokenizer.ggml.{key}", path) for key in ("model", "pre"))
    if (kind, split) != ("gpt2", "smollm"):
        raise ModelError(
            f"{path}: tokenizer {kind!r} with pre-tokenizer {split!r} is not implemented"
        )
    tokens = _value(reader, "tokenizer.ggml.tokens", path)
    kinds = _value(reader, "tokenizer.ggml.token_type", path)
    if len(kinds) != len(tokens):
        raise ModelError(f"{path}: {len(tokens)} tokens, but {len(kinds)} token types")
    pairs = [tuple(m.split(" ")) for m in _value(reader, "tokenizer.ggml.merges", path)]
    try:
        tokenizer = Tokenizer(models.BPE(vocab={t: n for n, t in enumerate(tokens)}, merges=pairs))
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"{path}: the tokenizer is damaged: {one_line(error)}") from error
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    added = [t for t, kind in zip(tokens, kinds, strict=True) if kind == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in added])
    named = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    settings: dict[str, Any] = {}
    for theirs, ours in named.items():
        number = _value(reader, f"tokenizer.ggml.{ours}_token_id", path, optional=True)
        if number is not None and int(number) < len(tokens):
            settings[theirs] = tokens[int(number)]
    template = _value(reader, "tokenizer.chat_template", path, optional=True)
    files = {
        chat_template.TOKENIZER: tokenizer.to_str().encode(),
        chat_template.SETTINGS: json.dumps(
            settings | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2, sort_keys=True
        ).encode(),
    }
    if template is not None:
        files[chat_template.TEMPLATE] = template.encode()
    return files


def _reader(path: Path) -> Any:
    if not path.is_file():
        raise ModelError(f"there is no {path}")
    return _read(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1)  # a large vocabulary takes seconds to read
def _read(path: Path, _: int) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
        raise ModelError(f"{path} is damaged: {one_line(error)}") from error


def _value(reader: Any, key: str, path: Path, *, optional: bool = False) -> Any:
    field = reader.get_field(key)
    if field is None:
        if optional:
            return None
        raise ModelError(f"{path}: {key} is missing")
    return field.contents()


def _config(reader: Any, path: Path) -> dict[str, Any]:
    """Return the content that config.json would have."""
    kind = _value(reader, "general.architecture", path)
    if kind != "llama":
        raise ModelError(f"{path}: architecture {kind!r} is not implemented in GGUF")
    fields = {
        "num_hidden_layers": "block_count",
        "hidden_size": "embedding_length",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "intermediate_size": "feed_forward_length",
        "max_position_embeddings": "context_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "rope_theta": "rope.freq_base",
    }
    tree = {theirs: _value(reader, f"llama.{ours}", path) for theirs, ours in fields.items()}
    known = {f"llama.{ours}" for ours in fields.values()}
    known |= {"llama.vocab_size", "llama.rope.dimension_count"}
    known |= {"llama.attention.key_length", "llama.attention.value_length"}
    head = _value(reader, "llama.rope.dimension_count", path, optional=True)
    unknown = [key for key in reader.fields if key.startswith("llama.") and key not in known]
    if unknown:
        raise ModelError(f"{path}: {unknown[0]} is not implemented")
    epsilon = float(np.format_float_positional(np.float32(tree["rms_norm_eps"])))
    return tree | {
        "model_type": "llama",
        "head_dim": None if head is None else int(head),
        "rms_norm_eps": epsilon,  # stored as float32: 9.999999747378752e-06
    }


def _name(theirs: str, path: Path) -> str:
    if theirs in _TOP_LEVEL:
        return _TOP_LEVEL[theirs]
    head, layer, part = [*theirs.split(".", 2), "", ""][:3]
    if head != "blk" or part not in _BLOCK:
        raise ModelError(f"{path}: tensor {theirs} is not implemented")
    return f"model.layers.{layer}.{_BLOCK[part]}"


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in tensor.shape[::-1])


def _to_halves(kernel: Array, heads: int) -> Array:
    """Reorder rows, [heads * D, W], from rotary pairs of neighbours to halves of each head."""
    width = kernel.shape[0] // heads // 2
    return kernel.reshape(heads, width, 2, -1).swapaxes(1, 2).reshape(kernel.shape)
