"""Makes the files beside this one: what transformers computes, of small models of each family.

Runs in the environment of other trainers: `make golden`. A model's weights are not kept: they
follow from their names (:func:`weights`), here and in the tests.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = 61
LENGTH = 48
PROMPT = 11  # tokens that the greedy text continues
GREEDY = 64

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LOCAL = {"rope_type": "default", "rope_theta": 10_000.0}


def _size(**fields: Any) -> dict[str, Any]:
    common = {"vocab_size": VOCABULARY, "num_hidden_layers": 3, "max_position_embeddings": 256}
    return common | {"rms_norm_eps": 1e-5} | fields


# Odd on purpose: heads in groups of one, two and three, widths that are no powers of two.
_GROUPED = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10}
_SINGLE = {"hidden_size": 21, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6}
_EQUAL = {"hidden_size": 28, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 14}
_NEAR = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
_FULL3 = {"rope_type": "linear", "rope_theta": 100_000.0, "factor": 8.0}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-a": ("Llama", _size(**_GROUPED, intermediate_size=38, tie_word_embeddings=True)),
    "llama-b": (
        "Llama",
        _size(**_SINGLE, intermediate_size=50, rope_parameters=_LLAMA3, tie_word_embeddings=False),
    ),
    "llama-c": (
        "Llama",
        _size(
            **_EQUAL,
            intermediate_size=34,
            rope_parameters={"rope_type": "linear", "rope_theta": 1e5, "factor": 2.0},
            tie_word_embeddings=False,
        ),
    ),
    "qwen2-a": (
        "Qwen2",
        _size(
            hidden_size=24,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=38,
            tie_word_embeddings=True,
        ),
    ),
    "qwen2-b": (
        "Qwen2",
        _size(
            hidden_size=30,
            num_attention_heads=3,
            num_key_value_heads=1,
            intermediate_size=50,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
    ),
    "qwen2-c": (
        "Qwen2",
        _size(
            hidden_size=28,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=34,
            tie_word_embeddings=False,
            **_NEAR,
        ),
    ),
    "qwen3-a": ("Qwen3", _size(**_GROUPED, intermediate_size=38, tie_word_embeddings=True)),
    "qwen3-b": (
        "Qwen3",
        _size(
            **_SINGLE,
            intermediate_size=50,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
    ),
    "qwen3-c": (
        "Qwen3",
        _size(**_EQUAL, intermediate_size=34, tie_word_embeddings=False, **_NEAR),
    ),
    "gemma2-a": ("Gemma2", _size(**_GROUPED, intermediate_size=38, sliding_window=7)),
    "gemma2-b": (
        "Gemma2",
        _size(
            **_SINGLE,
            intermediate_size=50,
            sliding_window=5,
            query_pre_attn_scalar=9,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=None,
            tie_word_embeddings=False,
        ),
    ),
    "gemma2-c": (
        "Gemma2",
        _size(
            **_EQUAL,
            intermediate_size=34,
            sliding_window=9,
            attn_logit_softcapping=None,
            final_logit_softcapping=4.0,
        ),
    ),
    "gemma3-a": (
        "Gemma3Text",
        _size(**_GROUPED, intermediate_size=38, sliding_window=7, query_pre_attn_scalar=10),
    ),
    "gemma3-b": (
        "Gemma3Text",
        _size(
            **_SINGLE,
            intermediate_size=50,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters={"full_attention": _FULL3, "sliding_attention": _LOCAL},
        ),
    ),
    "gemma3-c": (
        "Gemma3Text",
        _size(
            **_EQUAL,
            intermediate_size=34,
            sliding_window=9,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
            tie_word_embeddings=False,
        ),
    ),
}


def weights(name: str, shape: tuple[int, ...], offset: bool) -> np.ndarray:
    """A tensor's numbers, float32: by its name and shape alone.

    Args:
        name: as transformers calls it.
        shape: of the tensor.
        offset: whether norms scale by 1 + weight.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    # Raw Philox output is frozen by NumPy's stream policy; distributions are not.
    raw = np.random.Philox(seed).random_raw(int(np.prod(shape))) >> np.uint64(11)
    drawn = ((raw * 2.0**-53 - 0.5) * 12**0.5).reshape(shape)  # of variance 1
    if "norm" in name:
        return (0.3 * drawn + (0.0 if offset else 1.0)).astype(np.float32)
    if name.endswith("bias"):
        return (0.5 * drawn).astype(np.float32)
    scaled: np.ndarray = (drawn * 1.4 * shape[-1] ** -0.5).astype(np.float32)
    return scaled


def main() -> None:
    """Write NAME.json and NAME.npz of every model."""
    import torch
    import transformers

    here = Path(__file__).parent
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for name, (kind, fields) in MODELS.items():
        config = getattr(transformers, f"{kind}Config")(**fields, pad_token_id=None)
        config.eos_token_id = None
        config._attn_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        offset = kind.startswith("Gemma")
        with torch.no_grad():
            for key, leaf in model.named_parameters():
                leaf.copy_(torch.tensor(weights(key, tuple(leaf.shape), offset)))
        tokens = np.random.Philox(7).random_raw(2 * LENGTH).reshape(2, LENGTH) % VOCABULARY
        tokens = tokens.astype(np.int64)
        with torch.no_grad():
            logits = model(torch.tensor(tokens)).logits.numpy()
        greedy, margins = _greedy(model, tokens[0, :PROMPT])
        with tempfile.TemporaryDirectory() as scratch:
            model.save_pretrained(scratch)
            tree = json.loads((Path(scratch) / "config.json").read_text())
            from safetensors import safe_open

            with safe_open(Path(scratch) / "model.safetensors", "np") as file:
                shapes = {key: file.get_slice(key).get_shape() for key in sorted(file.keys())}
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        about = {"versions": versions, "config": tree, "tensors": shapes}
        (here / f"{name}.json").write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")
        np.savez_compressed(
            here / f"{name}.npz",
            tokens=tokens.astype(np.int32),
            logits=logits,
            greedy=np.asarray(greedy, np.int32),
        )
        print(f"{name}: spread {logits.std():.2f}, closest choice {min(margins):.4f}")
        if min(margins) < 1e-3:
            sys.exit(f"{name}: a choice is too close to be compared; draw other weights")


def _greedy(model: Any, prompt: np.ndarray) -> tuple[list[int], list[float]]:
    """64 likeliest tokens, and by how much each was ahead."""
    import torch

    ids, margins = [int(i) for i in prompt], []
    for _ in range(GREEDY):
        with torch.no_grad():
            last = model(torch.tensor([ids])).logits[0, -1]
        first, second = torch.topk(last, 2).values.tolist()
        margins.append(first - second)
        ids.append(int(last.argmax()))
    return ids[len(prompt) :], margins


if __name__ == "__main__":
    main()
