"""Settings beside a tokenizer.json that change ids: files by name, for each way."""

from __future__ import annotations

import json
from typing import Any

TEMPLATE = (
    "{{ image_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{{ eos_token }}\n{% endfor %}"
)
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "he <new> the<|stop|>  is <newer>"},
    {"role": "assistant", "content": "hello <|im_end|>  <new>"},
]
_NEW = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


def folders(backend: str) -> dict[str, dict[str, str]]:
    """Return the files of a model, without its weights, for each way."""
    known = json.loads(backend)["added_tokens"]
    added = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in known}
    first_free = str(1 + max(t["id"] for t in known))
    strips = {i: t | {"rstrip": t["content"] == "<|im_end|>"} for i, t in added.items()}
    new = {first_free: _NEW | {"content": "<new>", "special": True}}
    ways: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "nothing else": ({}, {}),
        "another flag": ({"added_tokens_decoder": strips}, {}),
        "a new token": ({"added_tokens_decoder": added | new}, {}),
        "additional tokens": ({"additional_special_tokens": ["<new>", "<|stop|>"]}, {}),
        "named tokens come first": (
            {"additional_special_tokens": ["<newer>"], "pad_token": "<new>", "sep_token": "<sep>"},
            {},
        ),
        "a new token by name": ({"extra_special_tokens": {"image_token": "<new>"}}, {}),
        "tokens of an older file": ({}, {"pad_token": "<new>", "mask_token": "<newer>"}),
        "a token by name": ({"extra_special_tokens": {"image_token": "<|stop|>"}}, {}),
        "an older file": ({}, {"eos_token": "<|stop|>"}),
        "an older file that is not read": (
            {"added_tokens_decoder": added},
            {"eos_token": "<|stop|>"},
        ),
    }
    base = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    return {
        way: {
            "tokenizer.json": backend,
            "tokenizer_config.json": json.dumps(base | settings),
            **({"special_tokens_map.json": json.dumps(older)} if older else {}),
        }
        for way, (settings, older) in ways.items()
    }
