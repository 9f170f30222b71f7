"""Training examples: Example, and its common case ReasoningTrace.

An Example is general: messages with roles, reasoning steps, expected answer, split and meta.
A ReasoningTrace is one prompt, its steps and its answer, as seeds generate it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from tunix_mlflow.data import canonical
from tunix_mlflow.errors import DatasetError

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

    content: str
    name: str | None = None
    """The speaker's name, if the data has one."""
    reasoning: str | None = None
    """The assistant's reasoning before `content`."""
    role: Literal["system", "user", "assistant", "tool"]
    tool_call_id: str | None = None
    """In a tool's reply: the call it answers."""
    tool_calls: str | None = None
    """Canonical JSON of the calls that follow `content`."""
    trained: bool | None = None
    """Whether it is trained on; None: if the role is assistant."""


class Example(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, gc=False
):
    """A training example; see :func:`completion` for what is learned of it."""

    answer: str | None = None
    messages: Annotated[tuple[Message, ...], Meta(min_length=1)]
    meta: dict[str, Any] = {}
    split: str | None = None
    steps: tuple[Step, ...] = ()

    @property
    def prompt(self) -> str:
        """The text of the last user message."""
        return next((m.content for m in reversed(self.messages) if m.role == "user"), "")


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


def expected_answer(example: Example) -> str | None:
    """Return the answer that a completion is compared with; None if the example has none.

    Nothing else decides it. An example with an expected answer has a completion
    of steps and answer; without one, the last message is the completion.
    """
    return example.answer


def prompt_messages(example: Example) -> tuple[Message, ...]:
    """Return the messages before the completion; none of a plain text."""
    return example.messages if expected_answer(example) is not None else example.messages[:-1]


def completion(example: Example) -> Message:
    """Return the message to learn: the answer after its steps, or the last message."""
    answer = expected_answer(example)
    if answer is None:
        return example.messages[-1]
    reasoning = "\n".join(step.content for step in example.steps) if example.steps else None
    return Message(role="assistant", content=answer, reasoning=reasoning)


def to_answer(messages: tuple[Message, ...]) -> Example:
    """Return an example that is a prompt only, for a model to answer."""
    return Example(messages=messages, answer="")


def prompt_digest(example: Example) -> str:
    """Return the sha256 of the prompt; examples that share it share a split.

    Over `role:bytes:content` of every message before the completion; over the text itself
    where nothing comes before it. The catalog derives the same in SQL.
    """
    messages = prompt_messages(example) or example.messages
    parts = (f"{m.role}:{len(m.content.encode())}:{m.content}" for m in messages)
    return canonical.digest("".join(parts).encode("utf-8"))
