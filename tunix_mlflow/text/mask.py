"""Which part of a rendered example is trained on, as ranges of characters.

A template with `{% generation %}` blocks says it itself. For any other one a turn is what follows
the prompt that asks for it, up to where the conversation goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tunix_mlflow.config.schema import DataConfig
from tunix_mlflow.data.examples import REASONING, Example, Message, completion
from tunix_mlflow.errors import DatasetError, ModelError
from tunix_mlflow.text import answers
from tunix_mlflow.text.chat_template import ChatTemplate, tools_of

_PROBE = "\ue0f2"  # a private character, which no text has

_ASSISTANT = ("assistant", "function_call")

Messages = Sequence[Mapping[str, Any]]


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
    text = template.render(messages, tools)
    turns = []
    for index in wanted:
        start = _turn_start(template, messages, tools, index, text)
        stop = _turn_stop(template, messages, tools, index, text, start, end_tokens)
        turns.append(Turn(index, [(start, stop)]))
    return Rendered(text, messages, tools, turns, False)


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
    own = [i for i, m in enumerate(messages) if m["role"] in _ASSISTANT]
    if len(generations) == len(own):
        parts = {i: [span] for i, span in zip(own, generations, strict=True)}
        return [Turn(index, parts[index]) for index in wanted]
    starts = [_content_start(template, messages, tools, i, text) for i in own]
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


def _content_start(
    template: ChatTemplate, messages: Messages, tools: list[Any] | None, index: int, text: str
) -> int:
    """Return where the text depends on what message `index` says."""
    probed = dict(messages[index]) | {"content": _PROBE}
    probed |= {key: _PROBE for key in REASONING if key in probed}
    other = template.render([*messages[:index], probed, *messages[index + 1 :]], tools)
    return _common_prefix(text, other)


def _turn_start(
    template: ChatTemplate, messages: Messages, tools: list[Any] | None, index: int, text: str
) -> int:
    """Return where message `index` begins in the text: after the prompt that asks for it.

    A prompt may open a thought that the turn does not have. Then the turn begins where they part,
    or where its own text begins.
    """
    try:
        prompt = template.render(messages[:index], tools, add_generation_prompt=True)
    except DatasetError:  # some templates refuse a part of a conversation
        prompt = text
    else:
        if text.startswith(prompt):
            return len(prompt)
    start = _content_start(template, messages, tools, index, text)
    return min(_common_prefix(text, prompt), start)


def _turn_stop(
    template: ChatTemplate,
    messages: Messages,
    tools: list[Any] | None,
    index: int,
    text: str,
    start: int,
    end_tokens: Sequence[str],
) -> int:
    """Return where message `index` ends in the text.

    A template may render a turn in another way when more messages follow, for example without its
    thought. Then the turn ends with the first end token after what is the turn's own.
    """
    if index == len(messages) - 1:
        return len(text)
    try:
        after = template.render(messages[: index + 1], tools)
    except DatasetError:
        after = ""
    if len(after) > start and text.startswith(after):
        return len(after)
    for kept in (("role", "name"), ("role", "name", "tool_calls")):
        probed = {k: v for k, v in messages[index].items() if k in kept} | {"content": _PROBE}
        try:
            other = template.render([*messages[:index], probed, *messages[index + 1 :]], tools)
        except DatasetError:
            continue  # a tool's reply without a call
        stop = max(start, len(text) - _common_prefix(text[::-1], other[::-1]))
        ends = [text.find(token, stop) + len(token) for token in end_tokens if token]
        limit = len(text)
        if messages[index + 1]["role"] in _ASSISTANT:  # both may be written as one turn
            limit = _content_start(template, messages, tools, index + 1, text)
        return min((end for end in ends if stop < end <= limit), default=stop)
    raise ModelError(
        f"{template.where}: the chat template renders message {index + 1} differently when more"
        " messages follow, so it is not known what to train on: mark it in the template with"
        " {% generation %} and {% endgeneration %}, or train on last turns only"
    )


def _common_prefix(one: str, other: str) -> int:
    pairs = zip(one, other, strict=False)
    differs = (i for i, (a, b) in enumerate(pairs) if a != b)
    return next(differs, min(len(one), len(other)))
