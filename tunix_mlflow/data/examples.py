"""Training examples: Example, and its common case ReasoningTrace.

An Example is general: messages with roles, reasoning steps, expected answer, split and meta.
A ReasoningTrace is one prompt, its steps and its answer, as seeds generate it.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from tunix_mlflow.data import canonical
from tunix_mlflow.errors import DatasetError

ROLES = (
    *("system", "developer", "user", "assistant"),
    *("tool", "function", "ipython", "observation", "function_call"),
)
"""The roles that chat templates know. The last is a call of the assistant's, those before it what
a tool replies."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""The names of a message's reasoning that are in use."""
TEXT = "text"
"""The role of a text without turns, which no template renders."""

SplitName = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_-]{0,31}\Z")]


# The fields of these three are sorted by name, so that they are encoded in canonical order.
# None can be part of a reference cycle, so the garbage collector need not track them.


class Step(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """One reasoning step."""

    content: Annotated[str, Meta(min_length=1)]
    i: Annotated[int, Meta(ge=0)]
    type: Annotated[str, Meta(min_length=1)] = "reasoning"


class Message(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, gc=False
):
    """One turn of a conversation."""

    content: str | None = None
    """None: the row has a null, which templates tell from an empty text."""
    name: str | None = None
    """The speaker's name, if the data has one."""
    reasoning: str | None = None
    """The assistant's reasoning, where the row keeps it apart from `content`."""
    reasoning_field: str | None = None
    """The row's name for it, by which templates find it; None: reasoning_content."""
    role: str
    """One of :data:`ROLES`, or :data:`TEXT`."""
    tool_call_id: str | None = None
    """In a tool's reply: the call it answers."""
    tool_calls: str | None = None
    """The calls that follow `content`, as JSON in the row's own spelling; see json_text."""
    trained: bool | None = None
    """Whether it is trained on; None: if it is the assistant's."""

    @property
    def text(self) -> str:
        """Its content; an empty text for a null."""
        return self.content or ""

    @property
    def is_assistant(self) -> bool:
        """Whether the assistant says it."""
        return self.role in ("assistant", "function_call", TEXT)


class Example(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, gc=False
):
    """A training example; see :func:`completion` for what is learned of it."""

    answer: str | None = None
    label: bool | None = None
    """Of labelled preference data: whether the completion is wanted."""
    messages: Annotated[tuple[Message, ...], Meta(min_length=1)]
    meta: dict[str, Any] = {}
    rejected: tuple[Message, ...] = ()
    """Of preference data in pairs: the turns that are worse than the last ones of `messages`."""
    split: str | None = None
    steps: tuple[Step, ...] = ()
    tools: str | None = None
    """The definitions of the tools, as JSON in the row's own spelling; see json_text."""

    @property
    def prompt(self) -> str:
        """The text of the last user message."""
        return next((m.text for m in reversed(self.messages) if m.role == "user"), "")


class ReasoningTrace(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One prompt, its steps and its answer."""

    prompt: Annotated[str, Meta(min_length=1)]
    steps: Annotated[tuple[Step, ...], Meta(min_length=1)]
    answer: Annotated[str, Meta(min_length=1)]
    split: SplitName | None = None
    meta: dict[str, Any] = {}

    def example(self) -> Example:
        """Return the trace as an Example."""
        return Example(
            messages=(Message(role="user", content=self.prompt),),
            steps=self.steps,
            answer=self.answer,
            split=self.split,
            meta=self.meta,
        )


def reasoning_trace(
    prompt: str,
    steps: list[tuple[str, str]],
    answer: str,
    *,
    split: str | None = None,
    meta: dict[str, Any] | None = None,
) -> ReasoningTrace:
    """Return a trace whose `steps` are (type, content) pairs; they are numbered from 0."""
    numbered = tuple(Step(i=i, type=t, content=c) for i, (t, c) in enumerate(steps))
    return ReasoningTrace(
        prompt=prompt, steps=numbered, answer=answer, split=split, meta=meta or {}
    )


def canonical_bytes(example: Example) -> bytes:
    """Return the bytes whose sha256 is the example's digest.

    Raises:
        ValueError: if a value has no canonical form.
    """
    meta = canonical.clean_meta(example.meta)
    if meta is not example.meta:
        example = msgspec.structs.replace(example, meta=meta)
    return canonical.encode_struct(example)


def example_id(example: Example) -> str:
    """Return the UUID of an example, which names it in messages."""
    return canonical.id_of(canonical.digest(canonical_bytes(example)))


def canonical_text(example: Example) -> str:
    """Return :func:`canonical_bytes` as text."""
    return canonical_bytes(example).decode("utf-8")


def from_canonical(text: str | bytes) -> Example:
    """Return the example of its canonical text.

    Raises:
        DatasetError: if the text is not an example.
    """
    try:
        return _DECODER.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DatasetError(f"a stored example cannot be read: {error}") from error


_DECODER = msgspec.json.Decoder(Example)


def is_text(example: Example) -> bool:
    """Return whether an example is a text without turns."""
    return example.messages[-1].role == TEXT


def is_preference(example: Example) -> bool:
    """Return whether an example says which answer is better, or whether one is wanted."""
    return bool(example.rejected) or example.label is not None


def expected_answer(example: Example) -> str | None:
    """Return the answer that a completion is compared with; None if the example has none.

    Nothing else decides it: the answer after the steps, or the content of the last turn, unless
    that calls a tool.
    """
    if example.answer is not None:
        return example.answer
    last = example.messages[-1]
    is_answer = last.role == "assistant" and last.tool_calls is None and len(example.messages) > 1
    return last.content if is_answer else None


def form_of(example: Example) -> str:
    """Return what an example ends with: `answer` (after its steps), `turn` or `text`."""
    if example.answer is not None:
        return "answer"
    return "text" if is_text(example) else "turn"


def prompt_messages(example: Example) -> tuple[Message, ...]:
    """Return the messages before the completion; none of a plain text."""
    return example.messages if example.answer is not None else example.messages[:-1]


def completion(example: Example) -> Message:
    """Return the message to learn: the answer after its steps, or the last message."""
    if example.answer is None:
        return example.messages[-1]
    reasoning = "\n".join(step.content for step in example.steps) if example.steps else None
    return Message(role="assistant", content=example.answer, reasoning=reasoning)


def select_turns(example: Example, turns: str) -> list[Example]:
    """Return what is trained on of an example: itself, or others with one turn to train on.

    Args:
        example: the example.
        turns: all, last or expand, as `data.turns`.
    """
    if turns == "all" or is_text(example):
        return [example]
    without = [msgspec.structs.replace(m, trained=False) for m in example.messages]
    if example.answer is None:
        alone = msgspec.structs.replace(example, messages=(*without[:-1], example.messages[-1]))
    else:
        alone = msgspec.structs.replace(example, messages=tuple(without))
    if turns == "last":
        return [alone]
    context = example.messages if example.answer is not None else example.messages[:-1]
    earlier = [
        Example(messages=(*without[:i], message), meta=example.meta, tools=example.tools)
        for i, message in enumerate(context)
        if message.is_assistant and message.trained is not False
    ]
    return [*earlier, alone]


def to_answer(messages: tuple[Message, ...], tools: str | None = None) -> Example:
    """Return an example that is a prompt only, for a model to answer, or a text to continue."""
    return Example(messages=messages, answer="", tools=tools)


def prompt_digest(example: Example) -> str:
    """Return the sha256 of the prompt; examples that share it share a split.

    Over `role:bytes:content` of every message before the completion; over the text itself
    where nothing comes before it. Definitions of tools come first, as a message of their own. The
    catalog derives the same in SQL.
    """
    messages = prompt_messages(example) or example.messages
    said = [(m.role, m.text) for m in messages]
    if example.tools is not None:
        said.insert(0, ("tools", example.tools))
    parts = (f"{role}:{len(text.encode())}:{text}" for role, text in said)
    return canonical.digest("".join(parts).encode("utf-8"))
