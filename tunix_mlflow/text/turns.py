"""Where the turns of a conversation stand in the text that a template makes of it.

A template is asked: the prompt for a turn usually begins the text, and so does the conversation up
to and with the turn. Where it does not, since the template writes earlier turns in another way once
more follow, the turn is found by what changes in the text when a message says something else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tunix_mlflow.data.examples import REASONING
from tunix_mlflow.errors import DatasetError, ModelError
from tunix_mlflow.text.chat_template import ChatTemplate

ASSISTANT = ("assistant", "function_call")
_PROBE = "\ue0f2probe\ue0f3"  # with private characters, so that no text has it

_ARGUMENTS = {"arguments": {_PROBE: _PROBE}}
_END = 60  # characters of a message by which its end is found in a prompt

Messages = Sequence[Mapping[str, Any]]


class Region(NamedTuple):
    """Where a text depends on a message."""

    first: int
    after: int  # the first character after it that does not


class Conversation:
    """A rendered conversation.

    Args:
        template: renders it.
        messages: as the template takes them.
        tools: definitions of tools, or None.

    Raises:
        DatasetError: if the template refuses the messages.
    """

    def __init__(self, template: ChatTemplate, messages: Messages, tools: list[Any] | None) -> None:
        self._template, self._messages, self._tools = template, messages, tools
        self.text = template.render(messages, tools)
        self._others: dict[int, str | None] = {}

    def span(self, index: int, end_tokens: Sequence[str]) -> tuple[int, int] | None:
        """Return the first character of a turn of the assistant, and the one after its last.

        The turn begins after the prompt that asks for it, and ends with its end token or where the
        conversation goes on. None: nothing of it is in the text.

        Args:
            index: of the message.
            end_tokens: the tokens, as text, that end a turn.

        Raises:
            ModelError: if another message is written inside the turn.
        """
        prompt = self._rendered(self._messages[:index], add_generation_prompt=True) or ""
        is_last = index == len(self._messages) - 1
        begins = prompt != "" and self.text.startswith(prompt)
        start = len(prompt) if begins else self._start(index, prompt)
        if start is None:
            return None
        if is_last:
            stop = len(self.text)
        else:
            whole = self._rendered(self._messages[: index + 1])
            if whole is not None and len(whole) > start and self.text.startswith(whole):
                stop = len(whole)
            else:
                begins, stop = False, self._stop(index, start, end_tokens)
        if not begins:
            self._check(index, start, stop)
        return start, stop

    def region(self, index: int) -> Region | None:
        """Return where the text depends on a message; None: it does not."""
        other = self._other(index)
        return None if other is None else _difference(self.text, other)

    def _start(self, index: int, prompt: str) -> int | None:
        """Return where a turn begins that its prompt does not lead up to.

        What stands between the message before and the turn is compared with how the prompt goes
        on after that message: it may open a thought that the turn does not have.
        """
        own = self.region(index)
        if own is None:
            return None
        for before in range(index - 1, -1, -1):
            region = self.region(before)
            if region is None:
                continue
            end = self.text[max(region.first, region.after - _END) : region.after]
            header = _header(prompt, end)
            if header is None or region.after > own.first:
                return own.first
            return min(region.after + _common_prefix(self.text[region.after :], header), own.first)
        return min(_common_prefix(self.text, prompt), own.first)

    def _stop(self, index: int, start: int, end_tokens: Sequence[str]) -> int:
        """Return where a turn ends: with the first end token between it and the next message."""
        own = self.region(index)
        stop = start if own is None else max(start, own.after)
        found = ((self.text.find(token, stop), token) for token in end_tokens if token)
        place, token = min(((p, t) for p, t in found if p >= 0), default=(-1, ""))
        if place < 0:
            return stop
        if self.text[stop:place].strip():  # is it an end of a later message?
            regions = (self.region(i) for i in range(index + 1, len(self._messages)))
            limit = next((r.first for r in regions if r and r.first >= stop), len(self.text))
            if place + len(token) > limit:
                return stop
        return place + len(token)

    def _check(self, index: int, start: int, stop: int) -> None:
        """Raise ModelError if a part of the text is another message's."""
        part = self.text[start:stop]
        for i, message in enumerate(self._messages):
            if i == index or not any(said in part for said in _said(message)):
                continue
            region = self.region(i)
            if region is None or not _overlap(region, start, stop):
                continue
            # What a message says may decide how others are written; what is added to it does not.
            longer = dict(message) | {"content": f"{message.get('content') or ''}{_PROBE}"}
            other = self._rendered([*self._messages[:i], longer, *self._messages[i + 1 :]])
            extended = region if other is None else _difference(self.text, other)
            if extended is not None and _overlap(extended, start, stop):
                raise ModelError(
                    f"{self._template.where}: the chat template writes message {i + 1} within"
                    f" message {index + 1}, so it is not known what to train on: set"
                    " data.turns=last or expand, or mark it in the template with {% generation %}"
                    " and {% endgeneration %}"
                )

    def _other(self, index: int) -> str | None:
        """Return the text with a message that says something else; None: it is refused."""
        if index not in self._others:
            self._others[index] = None
            for message in _probed(self._messages[index]):
                messages = [*self._messages[:index], message, *self._messages[index + 1 :]]
                if (text := self._rendered(messages)) is not None:
                    self._others[index] = text
                    break
        return self._others[index]

    def _rendered(self, messages: Messages, *, add_generation_prompt: bool = False) -> str | None:
        """Return a text; None: the template refuses a part of a conversation."""
        try:
            return self._template.render(
                messages, self._tools, add_generation_prompt=add_generation_prompt
            )
        except DatasetError:
            return None


def _header(prompt: str, end: str) -> str | None:
    """Return how the prompt for a turn goes on after the message before, by how that ends."""
    place = prompt.rfind(end) if end else -1
    return None if place < 0 else prompt[place + len(end) :]


def _probed(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a message that says something else: all of it, or what a template may accept."""
    said = dict(message) | {"content": _PROBE}
    said |= {key: _PROBE for key in REASONING if key in message}
    if message.get("tool_calls"):
        # Not the name: a template may write it before the tool's reply too.
        calls = [
            dict(given) | {"function": dict(given["function"]) | _ARGUMENTS}
            if isinstance(given.get("function"), Mapping)
            else dict(given) | _ARGUMENTS
            for given in message["tool_calls"]
        ]
        yield said | {"tool_calls": calls}
    yield said
    for kept in (("role", "name"), ("role", "name", "tool_calls")):
        yield {key: message[key] for key in kept if key in message} | {"content": _PROBE}


def _said(message: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a message says, as it stands and as JSON writes it."""
    for key in ("content", *REASONING):
        if text := str(message.get(key) or "").strip():
            yield text
            yield json.dumps(text, ensure_ascii=False)[1:-1]


def _overlap(region: Region, start: int, stop: int) -> bool:
    return region.first < stop and region.after > start


def _difference(text: str, other: str) -> Region | None:
    """Return the part of a text beside what both have at the beginning and at the end."""
    if text == other:
        return None
    first = _common_prefix(text, other)
    rest = _common_prefix(text[first:][::-1], other[first:][::-1])
    return Region(first, len(text) - rest)


def _common_prefix(one: str, other: str) -> int:
    """Return the number of characters with which both begin."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
