"""The formats that examples are exported in: trace, messages, prompt-completion, and Gemma's text.

All but the last are as formats.py reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Raw

from tunix_mlflow.data import canonical
from tunix_mlflow.data.examples import (
    Example,
    completion,
    from_canonical,
    prompt_messages,
)
from tunix_mlflow.errors import DatasetError

EXPORTS = ("trace", "messages", "prompt-completion", "gemma")


def writer(form: str) -> Callable[[bytes, str], Any]:
    """Return a function from canonical bytes and a split to an object of that form.

    It raises a DatasetError for an example that does not fit the form.

    Args:
        form: one of EXPORTS.
    """
    if form == "trace":
        return _to_trace
    convert = _CONVERTERS[form]

    def record(text: bytes, split: str) -> dict[str, Any]:
        example = from_canonical(text)
        result = convert(example) | {"split": split}
        return result | {"meta": example.meta} if example.meta else result

    return record


_CONTENT, _ROLE, _STEPS = b',"messages":[{"content":', b',"role":"user"}]', b',"steps":[{"content":'


def _to_trace(text: bytes, split: str) -> Raw:
    """Cut the trace form out of the canonical text, ten times as fast as decoding it.

    The keys are in the order answer, messages, meta, split, steps. The separators contain
    quotation marks, and those cannot occur in a string without a backslash before them.
    """
    answer, _, rest = text.partition(_CONTENT)
    prompt, one, rest = rest.partition(_ROLE)
    meta, _, steps = rest.rpartition(_STEPS)
    # A single message has no key after its content; the steps are at the end, those of meta not.
    fits = one and steps[-2:] == b"]}" and answer[:10] == b'{"answer":'
    if not fits or b'","' in prompt[1:-1]:
        raise DatasetError(
            "an example that is not one prompt with steps and an answer has no trace form;"
            " use --format messages"
        )
    if meta[-1:] == b'"':
        meta = meta[: meta.rindex(b',"split":"')]  # its own; the dataset's is used
    own = f',"split":"{split}"'.encode()
    parts = (b'{"prompt":', prompt, _STEPS, steps[:-1], b",", answer[1:], own, meta, b"}")
    return Raw(b"".join(parts))


def _to_messages(example: Example) -> dict[str, Any]:
    turns: list[dict[str, Any]] = []
    for message in (*prompt_messages(example), completion(example)):
        turn = msgspec.to_builtins(message)
        if message.tool_calls is not None:
            turn["tool_calls"] = canonical.decode(message.tool_calls)
        turns.append(turn)
    return {"messages": turns}


def _to_prompt_completion(example: Example) -> dict[str, Any]:
    turns = _to_messages(example)["messages"]
    if [turn["role"] for turn in turns] == ["user", "assistant"]:
        text = turns[1]["content"]
        if turns[1].get("reasoning"):
            text = f"<think>\n{turns[1]['reasoning']}\n</think>\n{text}"
        return {"prompt": turns[0]["content"], "completion": text}
    if len(turns) == 1:
        raise DatasetError("a plain text has no prompt; use --format messages or gemma")
    return {"prompt": turns[:-1], "completion": turns[-1:]}


def _to_gemma(example: Example) -> dict[str, Any]:
    """Write Gemma's turns as text. It has no system role: that text precedes the first prompt."""
    lead, text = "", ""
    for turn in _to_messages(example)["messages"]:
        content = turn["content"]
        if turn["role"] == "system":
            lead += content + "\n\n"
            continue
        if turn["role"] == "assistant" and turn.get("reasoning"):
            content = f"{turn['reasoning']}\n{content}"
        if turn.get("tool_calls"):
            content += canonical.encode(turn["tool_calls"]).decode()
        role = "model" if turn["role"] == "assistant" else "user"
        text += f"<start_of_turn>{role}\n{lead}{content}<end_of_turn>\n"
        lead = ""
    return {"text": text}


_CONVERTERS: dict[str, Callable[[Example], dict[str, Any]]] = {
    "messages": _to_messages,
    "prompt-completion": _to_prompt_completion,
    "gemma": _to_gemma,
}
