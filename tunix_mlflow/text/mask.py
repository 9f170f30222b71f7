"""Which part of a rendered example is trained on, as ranges of characters.

A template with `{% generation %}` blocks says it itself; for any other one see turns.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from tunix_mlflow.config.schema import DataConfig
from tunix_mlflow.data.examples import Example, Message, completion
from tunix_mlflow.errors import ModelError
from tunix_mlflow.text import answers
from tunix_mlflow.text.chat_template import ChatTemplate, tools_of
from tunix_mlflow.text.turns import ASSISTANT, Conversation, Messages


class Turn(NamedTuple):
    """A turn that is trained on."""

    message: int  # its index
    spans: list[tuple[int, int]]  # of its text: first character, and the one after the last


class Rendered(NamedTuple):
    """The text of an example, and what of it is trained on."""

    text: str
    messages: list[dict[str, Any]]  # as the template was given them
    tools: list[Any] | None
    turns: list[Turn]
    marked: bool  # whether the template says what is trained on


def is_trained(message: Message) -> bool:
    """Return whether a message is trained on: the assistant's, unless it is marked otherwise."""
    return message.is_assistant and message.trained is not False


def render(
    template: ChatTemplate, example: Example, end_tokens: Sequence[str], config: DataConfig
) -> Rendered:
    """Render an example with a pretrained model's template, and find what is trained on.

    Args:
        template: the template.
        example: the example.
        end_tokens: the tokens, as text, that end a turn of the assistant.
        config: whether and where reasoning is rendered.

    Raises:
        DatasetError: if the template refuses the messages.
        ModelError: if the template does not say where a turn begins and ends.
    """
    tools = tools_of(example)
    messages = rendered_messages(template, example.messages, config)
    trained = [is_trained(m) for m in example.messages]
    if example.answer is not None:
        content = answers.write_completion(completion(example), include_steps=config.include_steps)
        messages.append({"role": "assistant", "content": content})
        trained.append(True)
    wanted = [index for index, is_wanted in enumerate(trained) if is_wanted]
    if template.marks_generations(tools):
        marked = template.render_marked(messages, tools)
        turns = _marked_turns(template, messages, tools, wanted, *marked)
        return Rendered(marked.text, messages, tools, turns, True)
    conversation = Conversation(template, messages, tools)
    spans = [conversation.span(index, end_tokens) for index in wanted]
    turns = [Turn(i, [span] if span else []) for i, span in zip(wanted, spans, strict=True)]
    return Rendered(conversation.text, messages, tools, turns, False)


def rendered_messages(
    template: ChatTemplate, messages: Sequence[Message], config: DataConfig
) -> list[dict[str, Any]]:
    """Return messages as a template takes them, with their reasoning where `config` wants it."""
    inline = config.reasoning == "inline"
    return [
        template.message(m, include_steps=config.include_steps, inline=inline) for m in messages
    ]


def _marked_turns(
    template: ChatTemplate,
    messages: Messages,
    tools: list[Any] | None,
    wanted: list[int],
    text: str,
    generations: list[tuple[int, int]],
) -> list[Turn]:
    """Give each turn the generations that the template marks in it: one, several, or one that it
    shares with the next turn."""
    own = [i for i, m in enumerate(messages) if m["role"] in ASSISTANT]
    if len(generations) == len(own):
        parts = {i: [span] for i, span in zip(own, generations, strict=True)}
        return [Turn(index, parts[index]) for index in wanted]
    conversation = Conversation(template, messages, tools)
    regions = [conversation.region(i) for i in own]
    starts = [len(text) if region is None else region.first for region in regions]
    parts = {i: [] for i in own}
    for span in generations:
        before = [i for i, start in zip(own, starts, strict=True) if start < span[1]]
        inside = [i for i, start in zip(own, starts, strict=True) if span[0] <= start < span[1]]
        for index in inside or before[-1:] or own[:1]:
            parts[index].append(span)
    shared = {span for i in own if i not in wanted for span in parts[i]}
    if starts != sorted(starts) or any(span in shared for i in wanted for span in parts[i]):
        raise ModelError(
            f"{template.where}: the chat template marks {len(generations)} generations in a"
            f" conversation with {len(own)} turns of the assistant, and it is not known which are"
            " whose"
        )
    return [Turn(index, parts[index]) for index in wanted]
