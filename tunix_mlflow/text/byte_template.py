"""The chat template of models trained from scratch, for the byte tokenizer.

    <bos><user>What is 2+2?<assistant>2+2=4<answer>4<eos>

Everything after ``<assistant>`` is trained on, including the end of the sequence. A marker is a
token of its own, never text. Definitions of tools are a system turn before all others; calls
follow the content of their turn, as JSON. A text without turns stands between <bos> and <eos>.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from tunix_mlflow.data.examples import (
    Example,
    Message,
    completion,
    is_text,
    prompt_messages,
)
from tunix_mlflow.text.mask import is_trained

BOS, EOS, ANSWER = "<bos>", "<eos>", "<answer>"
ROLE_MARKERS = {
    "system": "<system>",
    "user": "<user>",
    "assistant": "<assistant>",
    "tool": "<tool>",
}
_SYNONYMS = {
    "developer": "system",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
_NAME = "chat-v2"


class Segment(NamedTuple):
    """A marker or a text of a rendered example."""

    text: str
    is_marker: bool
    trained: bool


def template_digest(include_steps: bool) -> str:
    """Return the sha256 (64 hex) of what decides the rendering."""
    markers = ",".join((BOS, EOS, ANSWER, *ROLE_MARKERS.values()))
    return hashlib.sha256(f"{_NAME}:{markers}:steps={include_steps}".encode()).hexdigest()


def render_prompt(example: Example, *, include_steps: bool) -> list[Segment]:
    """Render what a model is given: everything before the completion."""
    segments = [Segment(BOS, True, False)]
    if is_text(example):  # one that has an answer is continued
        begun = [Segment(example.messages[-1].text, False, False)]
        return segments if example.answer is None else segments + begun
    if example.tools is not None:
        segments.append(Segment(ROLE_MARKERS["system"], True, False))
        segments.append(Segment(example.tools, False, False))
    for message in prompt_messages(example):
        role = _SYNONYMS.get(message.role, message.role)
        segments.append(Segment(ROLE_MARKERS[role], True, False))
        segments += _render_message(message, include_steps)
    segments.append(Segment(ROLE_MARKERS["assistant"], True, False))
    return segments


def render(example: Example, *, include_steps: bool) -> list[Segment]:
    """Render the whole example: prompt and completion."""
    segments = render_prompt(example, include_steps=include_steps)
    last = completion(example)
    if example.answer is None:
        return segments + _render_message(last, include_steps)
    # The marker is written even without reasoning: an answer is what follows it.
    if include_steps and last.reasoning is not None:
        segments.append(Segment(last.reasoning, False, True))
    segments.append(Segment(ANSWER, True, True))
    segments.append(Segment(last.text, False, True))
    segments.append(Segment(EOS, True, True))
    return segments


def _render_message(message: Message, include_steps: bool) -> list[Segment]:
    content = message.text + (message.tool_calls or "")
    if not message.is_assistant:
        return [Segment(content, False, False)]
    trained = is_trained(message)
    segments = [Segment(content, False, trained), Segment(EOS, True, trained)]
    if message.reasoning is not None and include_steps:
        reasoning = Segment(message.reasoning, False, trained)
        return [reasoning, Segment(ANSWER, True, trained), *segments]
    return segments
