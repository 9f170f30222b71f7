"""Whether what an example says is in the text that a template made of it.

A template drops what it does not know: a thought, a call, the definitions of tools. Texts are
compared without white space around them, as they stand or as JSON writes them.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tunix_mlflow.data.examples import REASONING
from tunix_mlflow.text.mask import Rendered

CONTENT, THOUGHT, CALL, ARGUMENT, TOOL = "content", "thought", "call", "argument", "tool"
END, UNKNOWN, PROMPT, SPACE = "end", "unknown text", "prompt", "white space"
KINDS = {
    CONTENT: "the content is missing",
    THOUGHT: "the thought is missing",
    CALL: "the name of a call is missing",
    ARGUMENT: "an argument of a call is missing",
    TOOL: "a definition of a tool is missing",
    END: "no token ends the turn",
    UNKNOWN: "the tokenizer does not know a character",
    PROMPT: "the prompt at inference is not the beginning of what is trained on",
    SPACE: "white space around a text is trimmed",
}
"""What can be found, and what it means."""
_NEVER_REFUSED = (PROMPT, SPACE, TOOL)
_TAG = re.compile(r"</?think(?:ing)?>")
_EXCERPT = 60


class Finding(NamedTuple):
    """Something that an example says and its tokens do not, or the other way round."""

    kind: str  # one of KINDS
    turn: int  # number of its message, from 1; 0: the example
    trained: bool  # whether that message is trained on
    text: str  # what is missing, cut

    @property
    def refuses(self) -> bool:
        """Whether a model should not be trained on it without having been asked."""
        return self.trained and self.kind not in _NEVER_REFUSED


def missing(rendered: Rendered) -> list[Finding]:
    """Return what the messages and tools of an example say, and its text does not."""
    found: list[Finding] = []
    inside = {turn.message: _inside(rendered, turn.spans) for turn in rendered.turns}
    outside = _outside(rendered)
    for index, message in enumerate(rendered.messages):
        is_trained = index in inside
        where = inside.get(index, outside)
        # The longest first: each place in a turn stands for one thing that it says.
        for kind, text in sorted(_said(message), key=lambda each: -len(each[1])):
            spelling = next((s for s in _spellings(text) if s in where), None)
            if spelling is None:
                # A template may mark only what follows the thought.
                if kind == THOUGHT and is_trained and _before(rendered, index, text):
                    continue
                found.append(Finding(kind, index + 1, is_trained, _cut(text)))
                continue
            if is_trained:
                where = where.replace(spelling, "\0", 1)
            if spelling != text and text != text.strip():
                found.append(Finding(SPACE, index + 1, is_trained, _cut(text)))
    for tool in rendered.tools or ():
        if json.dumps(tool, ensure_ascii=False) not in outside:
            texts = (text for text in _definition(tool) if not _holds(outside, text))
            found += [Finding(TOOL, 0, False, _cut(text)) for text in itertools.islice(texts, 1)]
    return found


def _spellings(text: str) -> Iterator[str]:
    """Yield a text as it stands, without white space around it, and as JSON and Python write it."""
    yield text
    text = text.strip()
    yield text
    for ascii in (False, True):
        yield json.dumps(text, ensure_ascii=ascii)[1:-1]
    yield repr(text)[1:-1]
    yield text.replace("\\", "\\\\").replace("'", "\\'")


def _holds(text: str, piece: str) -> bool:
    return any(spelling in text for spelling in _spellings(piece))


def _said(message: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the kind and text of each thing that a message says."""
    content = message.get("content") or ""
    *thoughts, said = _TAG.split(content) if "</think" in content else [content]
    for thought in thoughts:
        if thought.strip():
            yield THOUGHT, thought
    if said.strip():
        yield CONTENT, said
    for key in REASONING:
        if str(message.get(key) or "").strip():
            yield THOUGHT, message[key]
    for call in message.get("tool_calls") or ():
        function = call.get("function") if isinstance(call.get("function"), dict) else call
        if isinstance(function.get("name"), str):
            yield CALL, function["name"]
        for text in _leaves(function.get("arguments")):
            yield ARGUMENT, text


def _leaves(value: Any) -> Iterator[str]:
    """Yield each key and each plain value of a JSON value, as text."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, float | int) and not isinstance(value, bool):
        yield json.dumps(value)  # true and null have other names in other languages


def _definition(tool: Any) -> Iterator[str]:
    """Yield what a definition says: names, descriptions and choices."""
    if isinstance(tool, dict):
        for key, value in tool.items():
            if key in ("name", "description") and isinstance(value, str):
                yield value
            elif key == "properties" and isinstance(value, dict):
                for name, item in value.items():
                    yield name
                    yield from _definition(item)
            elif key == "enum" and isinstance(value, list):
                yield from _leaves(value)
            else:
                yield from _definition(value)
    elif isinstance(tool, list):
        for item in tool:
            yield from _definition(item)


def _inside(rendered: Rendered, spans: Sequence[tuple[int, int]]) -> str:
    return "\n".join(rendered.text[start:stop] for start, stop in spans)


def _outside(rendered: Rendered) -> str:
    """The text without what is trained on."""
    parts, position = [], 0
    for turn in rendered.turns:
        for start, stop in turn.spans:
            parts.append(rendered.text[position:start])
            position = stop
    return "\n".join([*parts, rendered.text[position:]])


def _before(rendered: Rendered, index: int, text: str) -> bool:
    """Whether a thought stands right before what is trained on of its turn."""
    spans = next(turn.spans for turn in rendered.turns if turn.message == index)
    if not spans:
        return False
    start = spans[0][0]
    before = rendered.text[max(0, start - len(text) - 100) : start]
    return _TAG.sub("", before).rstrip().endswith(text.strip())


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _EXCERPT else text[:_EXCERPT] + "..."
