"""The formats that examples are exported in: trace, messages, prompt-completion, text, and Gemma's.

All but the last are as formats.py reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from msgspec import Raw

from tunix_mlflow.data.examples import (
    REASONING,
    Example,
    Message,
    completion,
    from_canonical,
    is_preference,
    is_text,
    prompt_messages,
)
from tunix_mlflow.errors import DatasetError

EXPORTS = ("trace", "messages", "prompt-completion", "preference", "text", "gemma")


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
        if is_preference(example) and form != "preference":
            raise DatasetError("preference data has a form of its own; use --format preference")
        result = convert(example) | {"split": split}
        return result | {"meta": example.meta} if example.meta else result

    return record


_MESSAGES, _CONTENT = b',"messages":[{', b'"content":'
_ROLE, _STEPS = b',"role":"user"}]', b',"steps":[{"content":'


def _to_trace(text: bytes, split: str) -> Raw:
    """Cut the trace form out of the canonical text, ten times as fast as decoding it.

    The keys are in the order answer, messages, meta, split, steps. The separators contain
    quotation marks, and those cannot occur in a string without a backslash before them.
    """
    answer, _, rest = text.partition(_MESSAGES)
    has_content, rest = rest.startswith(_CONTENT), rest[len(_CONTENT) :]
    prompt, one, rest = rest.partition(_ROLE)
    meta, _, steps = rest.rpartition(_STEPS)
    # A single message has no key after its content; the steps are at the end, those of meta not.
    fits = has_content and one and steps[-2:] == b"]}" and answer[:10] == b'{"answer":'
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
    if is_text(example):
        raise DatasetError("a plain text has no messages; use --format text")
    turns = _turns((*prompt_messages(example), completion(example)))
    return {"messages": turns} | _tools(example)


def _turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    for message in messages:
        turn = msgspec.to_builtins(message) | {"content": message.content}
        if message.reasoning is not None:
            turn[turn.pop("reasoning_field", REASONING[0])] = turn.pop("reasoning")
        if message.tool_calls is not None:
            turn["tool_calls"] = Raw(message.tool_calls.encode())
        turns.append(turn)
    return turns


def _tools(example: Example) -> dict[str, Any]:
    return {} if example.tools is None else {"tools": Raw(example.tools.encode())}


def _to_text(example: Example) -> dict[str, Any]:
    if not is_text(example):
        raise DatasetError("an example with turns has no text form; use --format messages")
    return {"text": example.messages[-1].text}


def _to_prompt_completion(example: Example) -> dict[str, Any]:
    turns = _to_messages(example)["messages"]
    if len(turns) == 1:
        raise DatasetError("a single turn has no prompt; use --format messages")
    if [set(turn) for turn in turns] == [{"role", "content"}] * 2 and turns[0]["role"] == "user":
        said = {"prompt": turns[0]["content"], "completion": turns[1]["content"]}
    else:
        said = {"prompt": turns[:-1], "completion": turns[-1:]}
    return said | _tools(example)


def _to_preference(example: Example) -> dict[str, Any]:
    if not is_preference(example):
        raise DatasetError("the example has no rejected answer and no label; use --format messages")
    if example.label is not None:
        return _to_prompt_completion(example) | {"label": example.label}
    turns = _turns(example.messages)
    # What is worse stands in place of the last turns.
    first = len(turns) - len(example.rejected)
    if all(message.is_assistant for message in example.rejected):
        asked = (i for i, m in enumerate(example.messages, start=1) if not m.is_assistant)
        first = max(asked, default=0)
    pair = {"chosen": turns[first:], "rejected": _turns(example.rejected)}
    return {"prompt": turns[:first], **pair} | _tools(example)


def _to_gemma(example: Example) -> dict[str, Any]:
    """Write Gemma's turns as text. It has no system role: that text precedes the first prompt."""
    lead, text = "", ""
    if example.tools is not None:
        lead = f"{example.tools}\n\n"
    for turn in _to_messages(example)["messages"]:
        content = turn["content"] or ""
        if turn["role"] in ("system", "developer"):
            lead += content + "\n\n"
            continue
        for name in REASONING:
            if name in turn:
                content = f"{turn[name]}\n{content}"
        if turn.get("tool_calls"):
            content += bytes(turn["tool_calls"]).decode()
        role = "model" if turn["role"] in ("assistant", "function_call") else "user"
        text += f"<start_of_turn>{role}\n{lead}{content}<end_of_turn>\n"
        lead = ""
    return {"text": text}


_CONVERTERS: dict[str, Callable[[Example], dict[str, Any]]] = {
    "messages": _to_messages,
    "prompt-completion": _to_prompt_completion,
    "preference": _to_preference,
    "text": _to_text,
    "gemma": _to_gemma,
}
