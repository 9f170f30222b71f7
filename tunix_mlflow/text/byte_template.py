"""How an example is written out for a model: the chat template, before any tokenizer.

    <bos><user>What is 2+2?<assistant>2+2=4<answer>4<eos>

Everything after ``<assistant>`` is trained on, the end of sequence included. A marker is a
token of its own and never a piece of text.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from tunix_mlflow.data.examples import Example, Message

BOS, EOS, ANSWER = "<bos>", "<eos>", "<answer>"
ROLE_MARKERS = {
    "system": "<system>",
    "user": "<user>",
    "assistant": "<assistant>",
    "tool": "<tool>",
}
_NAME = "chat-v1"


class Segment(NamedTuple):
    """A piece of a rendered example."""

    text: str
    marker: bool
    trained: bool


def template_digest(include_steps: bool) -> str:
    """sha256 (64 hex) of what decides the rendering."""
    markers = ",".join((BOS, EOS, ANSWER, *ROLE_MARKERS.values()))
    return hashlib.sha256(f"{_NAME}:{markers}:steps={include_steps}".encode()).hexdigest()


def render_prompt(example: Example, *, include_steps: bool = True) -> list[Segment]:
    """The part that a model is given: everything before the completion."""
    segments = [Segment(BOS, True, False)]
    messages = example.messages
    if not _has_answer(example):
        messages = messages[:-1]
    for message in messages:
        segments.append(Segment(ROLE_MARKERS[message.role], True, False))
        segments += _turn(message, include_steps)
    segments.append(Segment(ROLE_MARKERS["assistant"], True, False))
    return segments


def render(example: Example, *, include_steps: bool) -> list[Segment]:
    """The whole example: prompt and completion."""
    segments = render_prompt(example, include_steps=include_steps)
    if _has_answer(example):
        if include_steps and example.steps:
            text = "\n".join(step.content for step in example.steps)
            segments.append(Segment(text, False, True))
        segments.append(Segment(ANSWER, True, True))
        segments.append(Segment(example.answer or "", False, True))
        segments.append(Segment(EOS, True, True))
    else:
        segments += _turn(example.messages[-1], include_steps)
    return segments


def _turn(message: Message, include_steps: bool) -> list[Segment]:
    said = message.content + (message.tool_calls or "")
    if message.role != "assistant":
        return [Segment(said, False, False)]
    trained = message.trained is not False
    segments = [Segment(said, False, trained), Segment(EOS, True, trained)]
    if message.reasoning is not None and include_steps:
        thought = [Segment(message.reasoning, False, trained), Segment(ANSWER, True, trained)]
        return thought + segments
    return segments


def _has_answer(example: Example) -> bool:
    return example.answer is not None
