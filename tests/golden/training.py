"""Makes training.json: losses and gradient norms of a plain PyTorch loop, on chats with tools.

Runs in the environment of other trainers: `make golden`. Ids and masks are those of transformers'
`apply_chat_template`, by a template that marks what the assistant generates; every conversation is
a row of its own, and each update sees all of them. Nothing here is ours but the first weights.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tests.golden.make import weights
from tests.templates.peer import rendered
from tests.templates.small_tokenizers import small_tokenizers

GOLDEN = Path(__file__).parent / "training.json"
NAMES = (
    "multi-turn",
    "call with null content",
    "call, reply, answer",
    "inline thought",
    "thoughts as fields, multi-turn",
    "thought and call",
    "assistant twice",
    "non-ASCII",
    "leading newlines",
    "nested arguments",
)
STEPS, WARMUP = 20, 5
PEAK, FINAL = 3e-3, 0.1
B1, B2, EPSILON, DECAY, CLIP = 0.9, 0.95, 1e-8, 0.1, 1.0

MARKED = (
    "{% if tools %}<|im_start|>system\n# Tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}<call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</call>'
    "{% endfor %}<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}{{ m.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SETTINGS = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": MARKED}

_SHAPE = {
    **{"hidden_size": 24, "intermediate_size": 38, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048},
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {"tie_word_embeddings": False}),
    "gemma3": ("Gemma3Text", {"sliding_window": 32, "query_pre_attn_scalar": 10}),
}


def learning_rate(step: int) -> float:
    """Linear to the peak, then half a cosine to its tenth, at the last update."""
    if step < WARMUP:
        return PEAK * (step + 1) / WARMUP
    done = (step - (WARMUP - 1)) / (STEPS - 1 - (WARMUP - 1))
    return PEAK * (FINAL + (1 - FINAL) * (1 + math.cos(math.pi * done)) / 2)


def trained(kind: str, fields: dict[str, Any], rows: list[dict[str, Any]], vocabulary: int) -> Any:
    """Loss (nats per trained token) and gradient norm of each update."""
    import torch
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        **_SHAPE, **fields, vocab_size=vocabulary, pad_token_id=None
    )
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, leaf in parameters.items():
            leaf.copy_(torch.tensor(weights(key, tuple(leaf.shape), kind.startswith("Gemma"))))
    first = {key: torch.zeros_like(leaf) for key, leaf in parameters.items()}
    second = {key: torch.zeros_like(leaf) for key, leaf in parameters.items()}
    count = sum(sum(row["mask"]) for row in rows)
    losses, norms = [], []
    for step in range(STEPS):
        model.zero_grad()
        total = 0.0
        for row in rows:
            ids = torch.tensor([row["ids"]])
            mask = torch.tensor(row["mask"][1:], dtype=torch.bool)
            logits = model(ids).logits[0, :-1].float()
            chosen = torch.log_softmax(logits, -1)[torch.arange(len(mask)), ids[0, 1:]]
            loss = -chosen[mask].sum() / count
            loss.backward()
            total += loss.item()
        grads = {key: leaf.grad for key, leaf in parameters.items()}
        norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in grads.values()))
        losses.append(total)
        norms.append(norm)
        rate, clip = learning_rate(step), min(1.0, CLIP / norm)
        with torch.no_grad():
            for key, leaf in parameters.items():
                grad = grads[key] * clip
                first[key] = B1 * first[key] + (1 - B1) * grad
                second[key] = B2 * second[key] + (1 - B2) * grad**2
                change = first[key] / (1 - B1 ** (step + 1))
                change /= (second[key] / (1 - B2 ** (step + 1))).sqrt() + EPSILON
                leaf -= rate * (change + (DECAY * leaf if leaf.ndim > 1 else 0))
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        tree = json.loads((Path(scratch) / "config.json").read_text())
    shapes = {key: list(leaf.shape) for key, leaf in sorted(parameters.items())}
    return {"config": tree, "tensors": shapes, "loss": losses, "grad_norm": norms}


def main() -> None:
    """Write the file anew."""
    import torch
    import transformers

    torch.manual_seed(0)
    torch.set_num_threads(1)
    backend = small_tokenizers()["byte-level"]
    results = rendered(backend, SETTINGS, list(NAMES))
    rows = [results[name] for name in NAMES]
    vocabulary = Tokenizer.from_str(backend).get_vocab_size()
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    about: dict[str, Any] = {
        "versions": versions,
        "tokenizer": backend,
        "trained_tokens": sum(sum(row["mask"][1:]) for row in rows),
        "models": {n: trained(*MODELS[n], rows, vocabulary) for n in MODELS},
    }
    GOLDEN.write_text(json.dumps(about, indent=1) + "\n")
    for name, found in about["models"].items():
        print(name, *(f"{value:.4f}" for value in (*found["loss"][::5], *found["grad_norm"][::5])))


if __name__ == "__main__":
    main()
